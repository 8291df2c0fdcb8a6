"""From what the user calls a model to its files, its weights and its tokenizer.

A model is named by a hub name, a local directory, a GGUF file or a directory that holds one, or `demo`. Only
safetensors and GGUF are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgprune_cli.arch import spec_of
from pgprune_cli.atomic import read_json
from pgprune_cli.devices import devices_of, enough, spread
from pgprune_cli.errors import UserError
from pgprune_cli.gguf_header import read_header
from pgprune_cli.trust import (
    HOW_TO_CONVERT,
    PICKLED,
    check_directory,
    check_gguf,
    check_weight_name,
    refuse_links_out,
)

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
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
    return _in_directory(name, _download(name, WANTED if weights else ["config.json"]), weights)


def read_config(source: Source) -> Any:
    """What transformers reads the model's config as. Raises UserError where it cannot, or would run code for it."""
    from transformers import AutoConfig

    from pgprune_cli.writers import modeling_pruned  # noqa: F401  (makes our own exported models loadable)

    _check(source)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: its config cannot be used: {reason_of(error)}") from error


def check_prunable(source: Source) -> None:
    """Raises UserError for a model that no search could end well on; reads no weights, and of GGUF the header."""
    if source.gguf is not None:
        check_gguf(source.name, source.directory / source.gguf)
        return
    config = read_config(source)
    spec_of(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{source.name}: holds quantised weights, which cannot be cut; prune the original ones")


def load_model(source: Source, dtype: str, device: str) -> nn.Module:
    """The model, ready for forward passes: eval mode, no gradients, in `dtype` ("auto": as stored) on `device`.

    `device` is auto (one GPU, or as many as the weights need, or the CPU where there is none), a torch device, or a
    comma-separated list of them over which the layers are spread in order (several need accelerate). Raises UserError
    where the weights or the device are not to be had.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from pgprune_cli.writers import modeling_pruned  # noqa: F401  (makes our own exported models loadable)

    devices = _devices_for(source, dtype, device)
    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    arguments |= {"use_safetensors": True, "trust_remote_code": False}
    arguments["ignore_mismatched_sizes"] = True  # which are refused below, by their names
    _check(source)
    files = source.weight_files()
    _refuse_sizes_beyond(source, sum(weights_in(source, path) for path in files))
    if source.gguf is not None:
        arguments.update(_gguf_arguments(source.gguf))
    if len(devices) > 1:
        arguments["device_map"] = spread(read_config(source).num_hidden_layers, devices)
    elif devices[0].type == "cuda" and find_spec("accelerate"):
        arguments["device_map"] = {"": devices[0]}  # tensor by tensor, and never all of them in main memory
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or a table of all that does not fit would come before the line that says so
    logging.disable_progress_bar()
    # the GGUF reader draws a bar of its own, on a terminal or not
    silence = redirect_stderr(StringIO()) if source.gguf else nullcontext()
    try:
        with silence:
            model, info = AutoModelForCausalLM.from_pretrained(source.directory, output_loading_info=True, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: cannot be loaded: {reason_of(error)}") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    if misfits := sorted(info["mismatched_keys"]):
        name, stored, wanted = misfits[0]
        raise UserError(
            f"{source.name}: {len(misfits)} weights do not fit its config: {name} has the shape {tuple(stored)}, and "
            f"by the config it should be {tuple(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):  # which transformers makes up, with a warning
        raise UserError(f"{source.name}: its files lack {len(missing)} weights, the first is {missing[0]}")
    if len(devices) == 1:
        model = model.to(devices[0])
    _refuse_what_is_not_finite(source, model)
    return model.eval().requires_grad_(False)


def _devices_for(source: Source, dtype: str, device: str) -> list[torch.device]:
    """Those that the recipe names; of `auto`, as many as the weights need."""
    devices = devices_of(device)
    if device != "auto" or len(devices) == 1:
        return devices
    free = [torch.cuda.mem_get_info(one)[0] for one in devices]
    weights = sum(parameter.nbytes for parameter in _empty(source, dtype).parameters())
    return devices[: enough(weights, free)]


def empty_model(name: str, dtype: str) -> nn.Module:
    """The model as its config says, in `dtype` ("auto": as the config has it), on the meta device: without weights.

    Of a model of the hub only the config is downloaded. Raises UserError where there is none that can be read.
    """
    return _empty(resolve(name, weights=False), dtype)


def _empty(source: Source, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    wanted = str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, wanted))
    except Exception as error:  # of dozens of kinds, see above
        raise UserError(f"{source.name}: no model can be made of its config: {reason_of(error)}") from error
    return model.eval().requires_grad_(False)


def _check(source: Source) -> None:
    """Raises UserError for what transformers must not be given, which believes all that a config or header says."""
    if source.gguf is None:
        check_directory(source.name, source.directory)
    else:
        check_gguf(source.name, source.directory / source.gguf)


def weights_in(source: Source, path: Path) -> int:
    """How many one of its files holds. Raises UserError for a damaged one, which the libraries would not name."""
    from safetensors import SafetensorError, safe_open

    if source.gguf is not None:
        return read_header(path).weights
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors ({error}); fetch the model's files again") from None


def _refuse_sizes_beyond(source: Source, stored: int) -> None:
    """Raises UserError for a config of a model that is far larger than the weights `stored` for it: transformers would
    make up the rest, gigabytes of it. Where it lacks less, what it lacks is named later.
    """
    model = _empty(source, "float32")
    wanted = sum(parameter.numel() for parameter in model.parameters())
    quantised = getattr(model.config, "quantization_config", None) is not None  # several weights are stored as one
    if wanted > 2 * stored and not quantised:
        raise UserError(f"{source.name}: by its config it has {wanted:,} weights, and its files hold {stored:,}")


def _refuse_what_is_not_finite(source: Source, model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            more = "; or it has more than float16 holds: set dtype to bfloat16 or float32" if dtype == "float16" else ""
            raise UserError(f"{source.name}: {name} holds NaN or infinity: fetch the model's files again{more}")


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    from pgprune_cli.writers import modeling_pruned  # noqa: F401  (or transformers would ask whether to run its copy)

    _check(source)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # of dozens of kinds, see above
        raise UserError(f"{source.name}: its tokenizer cannot be loaded: {reason_of(error)}") from error


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
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: cannot be had from the hub ({_one_line(error)}); where the hub cannot be reached, "
            "give a local directory or a .gguf file as `model:`"
        ) from None


def _gguf_arguments(file: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"gguf_file": file}
    try:
        from transformers import GgufConfig
    except ImportError:  # before it existed, transformers always unpacked GGUF weights
        return arguments
    return arguments | {"quantization_config": GgufConfig(dequantize=True)}


def reason_of(error: Exception) -> str:
    """Why a loader failed; it would ask for an argument that users have not."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), and none is run"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
