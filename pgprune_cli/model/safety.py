"""Refuses what an untrusted model must not make pgprune read: files outside its directory, pickles, code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pgprune_cli.errors import UserError
from pgprune_cli.model.gguf_header import PARTS, read_header
from pgprune_cli.storage.records import read_json

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = "Convert pickled weights (*.bin) with: pgprune convert MODEL DIR"
PICKLES_REFUSED = f"pickled weights are not read, because they can run code. {CONVERT}"

ADAPTER = "adapter_config.json"
"""The config of an adapter made with PEFT. transformers would load other weights in place of the model's."""

MERGE = (
    "Merge it first: AutoPeftModelForCausalLM.from_pretrained(NAME).merge_and_unload().save_pretrained(DIRECTORY), and "
    "save the tokenizer there, too."
)

MAX_LAYERS = 1000
"""A config may ask for a billion layers, and building them would never end."""


def refuse_links_out(name: str, directory: Path) -> None:
    """Raise UserError if a symbolic link in a model directory leads out of it.

    The hub's cache consists of links from `models--x/snapshots/<revision>` to `models--x/blobs`, which are allowed.
    """
    root = Path(os.path.realpath(directory))
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in (*directory.iterdir(), *(directory / "additional_chat_templates").glob("*")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not any(target.is_relative_to(folder) for folder in allowed):
            raise UserError(
                f"{name}: {path} is a symbolic link to {target}, outside the model's directory. "
                "Replace it with a copy of the file."
            )


def check_weight_name(index: Path, name: str) -> None:
    """Raise UserError unless `name`, from an index, is the name of a safetensors file in the index's directory."""
    if Path(name).name != name or "\\" in name or "\0" in name or name == "..":
        raise UserError(f"{index}: {name!r} is not a plain file name. Fetch the model's files again.")
    if not name.endswith(".safetensors"):
        raise UserError(f"{index}: {name!r} is not a safetensors file. {CONVERT}")


def check_adapter(name: str, directory: Path, merged: bool) -> None:
    """Raise UserError for a directory with an `adapter_config.json`, unless only that is left of a merged adapter.

    merged: True if the directory holds the weights of a whole model.
    """
    files = [path.name for path in sorted(directory.glob("adapter_model*"))]
    if merged and files:
        raise UserError(
            f"{name}: holds a whole model and the weights of an adapter ({files[0]}). If the adapter is merged, remove "
            f"{files[0]}; else merge it first."
        )
    if not merged:
        base = read_json(directory / ADAPTER).get("base_model_name_or_path")
        raise UserError(f"{name}: holds an adapter for {base or 'another model'}, not a whole model. {MERGE}")


@contextmanager
def without_adapter(directory: Path) -> Iterator[Path]:
    """Yield a model directory, or links to its files if it has an `adapter_config.json`, which is left of a merge.

    With PEFT installed, transformers would load the adapter, too, or even its base model in place of these weights.
    """
    if not (directory / ADAPTER).exists():
        yield directory
        return
    with TemporaryDirectory(prefix="pgprune-") as links:
        for path in directory.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(links) / path.name).symlink_to(path.absolute())
        yield Path(links)


def check_directory(directory: Path) -> None:
    """Raise UserError if transformers would read other weights than those in the directory, or too many layers."""
    path = directory / "config.json"
    if not path.exists():
        return
    config = read_json(path)
    if "transformers_weights" in config:
        raise UserError(f"{path}: transformers_weights names other weight files. Remove this key.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        layers = section.get("num_hidden_layers", 0)
        if not isinstance(layers, int) or layers > MAX_LAYERS:
            raise UserError(f"{path}: num_hidden_layers is {layers!r}, not an integer up to {MAX_LAYERS}.")


def check_gguf(name: str, path: Path) -> None:
    """Raise UserError for a GGUF file that transformers must not be given or that cannot be pruned."""
    # Imported late, because it imports torch, and finding a model's files must stay quick.
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    from pgprune_cli.model.families import FAMILIES, family_of, model_type_of_gguf
    from pgprune_cli.model.gguf_config import USE_SAFETENSORS, rope_scaling

    header = read_header(path)
    if (parts := header.numbers.get(PARTS, 0)) > 1:
        raise UserError(f"{path}: one of {parts} parts of a model. Join them with: llama-gguf-split --merge")
    names = [names for family in FAMILIES for names in family.gguf.values()]
    if header.architecture in {each.unequal for each in names} - {each.equal for each in names}:
        raise UserError(
            f"{name}: only llama.cpp reads a GGUF file whose layers have different sizes. "
            "Give the run directory, or an export with --format hf."
        )
    if header.numbers.get(f"{header.architecture}.expert_count", 0):
        raise UserError(f"{name}: a mixture of experts, which pgprune does not read from GGUF. {USE_SAFETENSORS}")
    family_of(model_type_of_gguf(header.architecture))
    if header.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise UserError(
            f"{name}: transformers cannot read the architecture {header.architecture} from GGUF. {USE_SAFETENSORS}"
        )
    biases = (tensor for tensor in header.tensors if tensor.endswith(".bias"))
    read = ("attn_q.bias", "attn_k.bias", "attn_v.bias") if header.architecture == "qwen2" else ()
    if unread := next((bias for bias in biases if not bias.endswith(read)), None):
        raise UserError(f"{name}: transformers does not read its {unread} from GGUF. {USE_SAFETENSORS}")
    if header.layers > MAX_LAYERS:
        raise UserError(f"{path}: has {header.layers:,} layers, but at most {MAX_LAYERS} are supported.")
    rope_scaling(name, path, header)
