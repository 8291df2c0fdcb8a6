"""From what the user calls a model to its files, its weights and its tokenizer.

A model is named by a hub name, a local directory, a GGUF file or a directory that holds one, or `demo`. Only
safetensors and GGUF are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgprune_cli.atomic import read_json
from pgprune_cli.errors import UserError

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
INDEX = "model.safetensors.index.json"
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
            if Path(name).name != name:
                raise UserError(f"{self.directory / INDEX}: {name!r} is not a plain file name")
            if not (self.directory / name).is_file():
                raise UserError(f"{self.name}: {self.directory / name} is missing; fetch the model's files again")
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


def resolve(name: str) -> Source:
    """Finds the model's files, downloading from the hub where `name` is no path. Raises UserError."""
    if name == "demo":
        return Source(name, DEMO_MODEL, None)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name}: a model is a directory, a .gguf file or a hub name, and this is another file")
        return Source(name, path.parent, path.name)
    if path.is_dir():
        return _in_directory(name, path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "models/")):
        raise UserError(f"{name}: no such directory or .gguf file, and not a hub name (owner/name) either")
    return _in_directory(name, _download(name))


def load_model(source: Source, dtype: str, device: str) -> nn.Module:
    """The model, ready for forward passes: eval mode, no gradients, in `dtype` ("auto": as stored) on `device`.

    `device` is auto, a torch device, or a comma-separated list of them over which the layers are spread in order
    (which needs accelerate). Raises UserError where the weights or the device are not to be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from pgprune_cli.writers import modeling_pruned  # noqa: F401  (makes our own exported models loadable)

    devices = devices_of(device)
    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if source.gguf is None:
        arguments["use_safetensors"] = True
        for path in source.weight_files():
            _refuse_cut(path)
    else:
        arguments.update(_gguf_arguments(source.gguf))
    logging.disable_progress_bar()
    # the GGUF reader draws a bar of its own, on a terminal or not
    silence = redirect_stderr(StringIO()) if source.gguf else nullcontext()
    try:
        if len(devices) > 1:
            arguments["device_map"] = spread(AutoConfig.from_pretrained(source.directory).num_hidden_layers, devices)
        with silence:
            model, info = AutoModelForCausalLM.from_pretrained(source.directory, output_loading_info=True, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: cannot be loaded: {_one_line(error)}") from error
    finally:
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):  # which transformers makes up, with a warning
        raise UserError(f"{source.name}: its files lack {len(missing)} weights, the first is {missing[0]}")
    if len(devices) == 1:
        model = model.to(devices[0])
    _refuse_what_is_not_finite(source, model)
    return model.eval().requires_grad_(False)


def _refuse_cut(path: Path) -> None:
    """The libraries do not say which file of many it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors ({error}); fetch the model's files again") from None


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

    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoTokenizer.from_pretrained(source.directory, **arguments)
    except Exception as error:  # of dozens of kinds, see above
        raise UserError(f"{source.name}: its tokenizer cannot be loaded: {_one_line(error)}") from error


def devices_of(device: str) -> list[torch.device]:
    """The devices that a recipe's `device` names. Raises UserError for one that this machine lacks."""
    if device == "auto":
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    try:
        devices = [torch.device(name.strip()) for name in device.split(",")]
    except RuntimeError:
        raise UserError(
            f"device {device!r}: expected auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1"
        ) from None
    for wanted in devices:
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices")
    return devices


def spread(layers: int, devices: list[torch.device]) -> dict[str, torch.device]:
    """A device map that puts equal runs of layers on the devices in order, the embedding first and the head last."""
    device_map = {f"model.layers.{i}": devices[i * len(devices) // layers] for i in range(layers)}
    return device_map | {
        "model.embed_tokens": devices[0],
        "model.rotary_emb": devices[0],
        "model.norm": devices[-1],
        "lm_head": devices[-1],
    }


def _in_directory(name: str, directory: Path) -> Source:
    if (directory / "config.json").exists():
        if (directory / "model.safetensors").exists() or (directory / INDEX).exists():
            return Source(name, directory, None)
        raise UserError(
            f"{name}: has a config.json but neither model.safetensors nor {INDEX}; pickled weights (*.bin), which can "
            "run code, are not read: scripts/convert_to_safetensors.py converts them"
        )
    files = sorted(path.name for path in directory.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, directory, files[0])
    if files:
        raise UserError(f"{name}: holds {len(files)} GGUF files; name the one you mean: {', '.join(files)}")
    raise UserError(f"{name}: holds neither config.json with safetensors nor a .gguf file")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: cannot be had from the hub ({_one_line(error)}); where the hub cannot be reached, "
            "give a local directory or a .gguf file as `model:`"
        ) from None


def _gguf_arguments(file: str) -> dict[str, Any]:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{file}: reading GGUF needs the extra: pip install 'pgprune[gguf]'") from None
    arguments: dict[str, Any] = {"gguf_file": file}
    try:
        from transformers import GgufConfig
    except ImportError:  # before it existed, transformers always unpacked GGUF weights
        return arguments
    return arguments | {"quantization_config": GgufConfig(dequantize=True)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
