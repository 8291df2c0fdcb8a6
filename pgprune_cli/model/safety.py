"""What of a model is read, whoever made it: nothing that lies outside of its directory, no pickles, no code."""

from __future__ import annotations

import os
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.model.gguf_header import read_header
from pgprune_cli.storage.records import read_json

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HOW_TO_CONVERT = (
    "pickled weights (*.bin), which can run code, are not read: scripts/convert_to_safetensors.py converts them"
)

MOST_LAYERS = 1000
"""Building a model of a billion layers, as a config may ask for, would never end."""


def refuse_links_out(name: str, directory: Path) -> None:
    """Raises UserError where something in a model directory is a symbolic link to what is outside of it.

    But the hub's cache is made of links from `models--x/snapshots/<revision>` to `models--x/blobs`.
    """
    here = Path(os.path.realpath(directory))
    inside = [here, here.parents[1] / "blobs"] if here.parent.name == "snapshots" else [here]
    for path in (*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not any(target.is_relative_to(root) for root in inside):
            raise UserError(
                f"{name}: {path} is a symbolic link out of the model's directory, to {target}; put a copy in its place"
            )


def check_weight_name(index: Path, name: str) -> None:
    """Raises UserError unless `name`, which an index gives, is that of a safetensors file in the index's directory."""
    if Path(name).name != name or "\\" in name or "\0" in name or name == "..":
        raise UserError(f"{index}: {name!r} is not a plain file name")
    if not name.endswith(".safetensors"):
        raise UserError(f"{index}: {name!r} is not a safetensors file; {HOW_TO_CONVERT}")


def check_directory(name: str, directory: Path) -> None:
    """Raises UserError where transformers would read other weights than those that lie in the directory."""
    if (directory / "adapter_config.json").exists():  # whose base it would load instead
        raise UserError(f"{name}: holds an adapter (adapter_config.json); merge it into its base model first")
    if not (directory / "config.json").exists():
        return
    config = read_json(directory / "config.json")
    if "transformers_weights" in config:
        raise UserError(f"{directory / 'config.json'}: names its weights (transformers_weights); remove that key")
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > MOST_LAYERS:
        raise UserError(f"{directory / 'config.json'}: num_hidden_layers {layers!r}: at most {MOST_LAYERS} are read")


def check_gguf(name: str, path: Path) -> None:
    """Raises UserError for a GGUF file that transformers must not be given, or has nothing to make of it."""
    # Imported late: it imports torch, and finding a model's files must stay quick.
    from pgprune_cli.model.families import family_of

    header = read_header(path)
    if header.architecture == "deci":
        raise UserError(
            f"{name}: layers of different sizes in a GGUF file are for llama.cpp; "
            "name the run, or its export as --format hf"
        )
    family_of(header.architecture)
    if header.layers > MOST_LAYERS:
        raise UserError(f"{path}: {header.layers:,} layers: at most {MOST_LAYERS} are read")
