"""From what the user calls a model to its files: a hub name, a directory, a GGUF file or a directory with one, `demo`.

Light: nothing is read of the files but what says where the weights are.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pgprune_cli.console.hub_logging import quiet_hub
from pgprune_cli.errors import UserError, in_short
from pgprune_cli.model.safety import HOW_TO_CONVERT, PICKLED, check_weight_name, refuse_links_out
from pgprune_cli.storage.records import read_json

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
INDEX = "model.safetensors.index.json"
WANTED = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]
"""The files of a hub model that are downloaded: nothing pickled, and no code."""
SAMPLED = 1 << 16
"""Bytes read at each of the places of a weight file that go into its fingerprint."""


@dataclass(frozen=True)
class Source:
    """Where a model lies: `directory` holds its files; `gguf` is the file's name where the weights are GGUF."""

    name: str
    directory: Path
    gguf: str | None

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in the order of the index. Raises UserError when one is missing."""
        if self.gguf is not None:
            return [self.directory / self.gguf]
        if (self.directory / INDEX).exists():
            places = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
                raise UserError(f"{self.directory / INDEX}: holds no weight_map that says which file a weight is in")
            names = list(dict.fromkeys(places.values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            check_weight_name(self.directory / INDEX, name)
            if not (self.directory / name).is_file():
                raise UserError(f"{self.name}: {self.directory / name} is missing; fetch the model's files again")
        if (self.directory / "model.safetensors").exists() and names != ["model.safetensors"]:  # which would be loaded
            raise UserError(f"{self.name}: holds both model.safetensors and other weights, of {INDEX}; remove one")
        return [self.directory / name for name in names]

    def fingerprint(self) -> str:
        """Identifies config and weights: sha256 over config.json, and of each weight file its size and 64 samples.

        Sampled, so that it takes no time on 140 GB; a retrained or re-quantised file differs in every sample.
        """
        digest = hashlib.sha256()
        if self.gguf is None:
            digest.update((self.directory / "config.json").read_bytes())
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size};".encode())
            with path.open("rb") as file:
                for sample in range(64):
                    file.seek(size * sample // 64)
                    digest.update(file.read(SAMPLED))
        return digest.hexdigest()


def resolve(name: str, weights: bool = True) -> Source:
    """Finds the model's files, downloading from the hub where `name` is no path. Raises UserError.

    Without `weights` a config.json will do, and no more than that is downloaded.
    """
    found = find_local(name, weights)
    return found or _in_directory(name, _download(name, WANTED if weights else ["config.json"]), weights)


def find_local(name: str, weights: bool = True) -> Source | None:
    """The model's files where `name` is of a place on this machine, None for a hub name. Raises UserError as above."""
    if name == "demo":
        return Source(name, DEMO_MODEL, None)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix in PICKLED:
            raise UserError(f"{name}: {HOW_TO_CONVERT}")
        if path.suffix != ".gguf":
            raise UserError(f"{name}: a model is a directory, a .gguf file or a hub name, and this is another file")
        return Source(name, path.parent, path.name)
    if path.is_dir():
        return _in_directory(name, path, weights)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "models/", "runs/")):
        raise UserError(f"{name}: no such directory or .gguf file, and not a hub name (owner/name) either")
    return None


def _in_directory(name: str, directory: Path, weights: bool) -> Source:
    refuse_links_out(name, directory)
    if (directory / "config.json").exists():
        if not weights or (directory / "model.safetensors").exists() or (directory / INDEX).exists():
            return Source(name, directory, None)
        raise UserError(f"{name}: has a config.json but neither model.safetensors nor {INDEX}; {HOW_TO_CONVERT}")
    files = sorted(path.name for path in directory.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, directory, files[0])
    if files:
        raise UserError(f"{name}: holds {len(files)} GGUF files; name the one you mean: {', '.join(files)}")
    raise UserError(f"{name}: holds neither config.json with safetensors nor a .gguf file")


def _download(name: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: cannot be had from the hub ({in_short(error)}); where the hub cannot be reached, "
            "give a local directory or a .gguf file as `model:`"
        ) from None
