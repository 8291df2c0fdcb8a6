"""Finds the files of a model, given as a hub name, a directory, a GGUF file, a directory with one, or `demo`.

This is quick: the only file that is read is the index that lists the weight files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pgprune_cli.console.hub_logging import quiet_hub
from pgprune_cli.errors import UserError, in_short
from pgprune_cli.model.names import DEMO, WEIGHT_FILES, is_hub_name
from pgprune_cli.model.safety import (
    ADAPTER,
    CONVERT,
    PICKLED,
    PICKLES_REFUSED,
    check_adapter,
    check_weight_name,
    refuse_links_out,
)
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import read_json

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
INDEX = "model.safetensors.index.json"
CONFIGS = ["config.json", ADAPTER]
DOWNLOADED = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "LICENSE*", "NOTICE*"]
"""Patterns of the files that are downloaded from the hub: no pickles and no code."""

CONVERTED = {"models/vicuna-7b": "lmsys/vicuna-7b-v1.5", "models/vicuna-13b": "lmsys/vicuna-13b-v1.5"}
"""The directories of shipped recipes whose models the hub has only as pickles, and their names there."""
FETCHED = {"models/smollm2-135m": ("scripts/fetch_smollm2.sh", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""The directories of shipped recipes that a script fills, with the script and the name of the same model on the hub."""


@dataclass(frozen=True)
class Source:
    """Where a model is.

    name: what the user calls it; directory: holds its files; gguf: name of the weight file if it is GGUF, else None;
    has_weights: False if only the config is asked for and there are no weights, or those of a model on the hub.
    """

    name: str
    directory: Path
    gguf: str | None
    has_weights: bool = True

    @property
    def is_wrapped(self) -> bool:
        """True for a model of text and images, whose config and tensors are those of a decoder inside a wrapper."""
        # Imported late, because it imports torch, and finding a model's files must stay quick.
        from pgprune_cli.model.families.wrapper import is_wrapper

        return self.gguf is None and is_wrapper(read_json(self.directory / "config.json").get("model_type"))

    def weight_files(self) -> list[Path]:
        """Return the files that hold the weights, in the order of the index. Raises UserError if one is missing."""
        if self.gguf is not None:
            return [self.directory / self.gguf]
        index = self.directory / INDEX
        names = _files_in_index(index) if index.exists() else ["model.safetensors"]
        for name in names:
            check_weight_name(index, name)
            if not (self.directory / name).is_file():
                raise UserError(f"{self.directory / name}: missing. Fetch the model's files again.")
        if (self.directory / "model.safetensors").exists() and names != ["model.safetensors"]:
            # transformers would load model.safetensors and ignore the index
            raise UserError(f"{self.name}: holds both model.safetensors and the weights listed in {INDEX}. Remove one.")
        return [self.directory / name for name in names]

    def fingerprint_parts(self) -> dict[str, str]:
        """Return the parts of the model's fingerprint (`fingerprint.py`). Raises UserError for damaged files."""
        # Imported late, because it imports torch, and finding a model's files must stay quick.
        from pgprune_cli.model.fingerprint import parts_of

        return parts_of(self.directory, self.gguf, self.weight_files())

    def fingerprint(self) -> str:
        """Return the digest of config, tokenizer and weights. Raises UserError for damaged files."""
        from pgprune_cli.model.fingerprint import digest

        return digest(self.fingerprint_parts())


def _files_in_index(index: Path) -> list[str]:
    """Return the names of the weight files in an index, each once. Raises UserError for an index without any."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files. Fetch the model's files again.")
    return list(dict.fromkeys(weight_map.values()))


def resolve(name: str, weights: bool = True) -> Source:
    """Return where the model's files are, after downloading them if `name` is on the hub. Raises UserError.

    weights: if False, config.json is enough, and nothing else is downloaded.
    """
    if (local := find_local(name, weights)) is not None:
        return local
    source = _on_hub(name, download(name, DOWNLOADED if weights else CONFIGS), weights)
    return source if weights else replace(source, has_weights=False)  # some may be left of an earlier download


def find_local(name: str, weights: bool = True) -> Source | None:
    """Return where a model on this machine is, or None if `name` is a hub name. Raises UserError as `resolve` does."""
    if name == DEMO:
        return Source(name, DEMO_MODEL, None)
    if not name.strip():
        raise UserError("the name of the model is empty. Give a directory, a .gguf file or a hub name (owner/name).")
    path = expanded(name)
    if path.is_file():
        if path.suffix in PICKLED:
            raise UserError(f"{name}: {PICKLES_REFUSED}")
        if path.suffix != ".gguf":
            raise UserError(f"{name}: not a model. Give a directory, a .gguf file or a hub name (owner/name).")
        return Source(name, path.parent, path.name)
    if path.is_dir():
        return _in_directory(name, path, weights)
    if name.endswith(WEIGHT_FILES):
        raise UserError(f"{name}: no such file. Check the spelling.")
    if (hub_name := CONVERTED.get(name)) is not None:
        raise UserError(
            f"{name}: no such directory. The hub has this model only as pickled weights. Convert them once: "
            f"pgprune convert {hub_name} {name}"
        )
    if name in FETCHED:
        script, hub_name = FETCHED[name]
        raise UserError(
            f"{name}: no such directory. Run {script}, which downloads the model, or take it from the hub: "
            f"--set model={hub_name}"
        )
    if not is_hub_name(name):
        raise UserError(
            f"{name}: no such directory or .gguf file, and not a hub name (owner/name) either. Check the spelling."
        )
    owner, _, model = name.partition("/")
    if Path(owner).is_dir():  # a misspelt path must not become the name of a stranger's model
        raise UserError(
            f"{name}: {owner} is a directory here, but {model} is not in it. Check the spelling, or download the model "
            f"of that name from the hub: hf download {name} --local-dir {name}"
        )
    return None


def resolve_recorded(name: str) -> Source:
    """Return where the model is that a run or an export names. Raises UserError as `resolve` does.

    Runs name local models by their absolute paths. Any other name is on the hub, whatever the working directory holds.
    """
    return _on_hub(name, download(name, DOWNLOADED), True) if is_hub_name(name) else resolve(name)


def find_recorded(name: str) -> Source | None:
    """Return where the model is that a run names, or None if its files are not on this machine. Asks no hub."""
    try:
        if is_hub_name(name):
            return _in_directory(name, download(name, DOWNLOADED, local_files_only=True), True)
        return find_local(name)
    except UserError:
        return None


def gguf_refusal(name: str) -> str:
    """Return the error message about a repository on the hub that holds the model as GGUF only."""
    return (
        f"{name}: holds GGUF files and no safetensors. Download one of the files, and give its path: "
        f"hf download {name} FILE.gguf --local-dir DIR"
    )


def _on_hub(name: str, directory: Path, weights: bool) -> Source:
    """Return where a model is whose files were downloaded from the hub into a directory. Raises UserError."""
    try:
        if not directory.is_dir():  # no file of the repository was downloaded
            raise UserError(f"{name}: the repository on the hub holds no model with safetensors.")
        return _in_directory(name, directory, weights, ignore_gguf=not weights)
    except UserError:
        if not _has_weights(directory) and _lists_gguf(name):
            raise UserError(gguf_refusal(name)) from None
        raise


def _lists_gguf(name: str) -> bool:
    """Return whether a repository on the hub has GGUF files. False if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return any(file.endswith(".gguf") for file in HfApi().list_repo_files(name))
    except Exception:  # the network fails with dozens of types
        return False


def _has_weights(directory: Path) -> bool:
    return (directory / "model.safetensors").exists() or (directory / INDEX).exists()


def _in_directory(name: str, directory: Path, weights: bool, ignore_gguf: bool = False) -> Source:
    """Return the model in a directory. Raises UserError.

    ignore_gguf: True if config.json counts although no weights are here but a GGUF file, left of another download.
    """
    refuse_links_out(name, directory)
    stored = _has_weights(directory)
    files = sorted(path.name for path in directory.glob("*.gguf") if path.is_file())
    if (directory / ADAPTER).exists() and (stored or not files):
        check_adapter(name, directory, merged=stored)
    has_config = (directory / "config.json").exists()
    if stored and has_config:
        return Source(name, directory, None)
    if files and not (has_config and ignore_gguf):
        if len(files) > 1:
            raise UserError(f"{name}: holds {len(files)} GGUF files. Name the one to use: {', '.join(files)}.")
        return Source(name, directory, files[0])
    if has_config:
        if not weights and not any(directory.glob("pytorch_model*.bin")):
            return Source(name, directory, None, False)
        raise UserError(f"{name}: has config.json, but neither model.safetensors nor {INDEX}. {CONVERT}")
    raise UserError(
        f"{name}: holds neither config.json with safetensors nor a .gguf file. Give the directory of a model."
    )


def download(name: str, patterns: list[str], local_files_only: bool = False) -> Path:
    """Return the directory of a model on the hub, with the files that match. Raises UserError if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: no such directory, and it cannot be downloaded from the hub ({in_short(error)}). "
            "Without access to the hub, give a local directory or a .gguf file as `model:`."
        ) from None
