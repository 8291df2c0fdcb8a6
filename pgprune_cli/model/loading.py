"""From a model's files to its config, its weights and its tokenizer.

Only safetensors and GGUF are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgprune_cli.errors import UserError, in_short
from pgprune_cli.model.devices import device_map, devices_needed, devices_of
from pgprune_cli.model.families import family_of, family_of_export
from pgprune_cli.model.gguf_header import read_header
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import QuantizedLinear, check_fp8, quantize_projections
from pgprune_cli.model.safety import check_directory, check_gguf
from pgprune_cli.model.source import Source, resolve

WeightFormat = Literal["full", "int8", "fp8"]
"""How the prunable projections are stored in memory: in the model's dtype, or in one byte per weight (quantized.py)."""


def read_config(source: Source) -> Any:
    """Return the model's transformers config. Raises UserError if it cannot be read, or would need code of its own."""
    from transformers import AutoConfig

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (registers the classes of exported models)

    _check_files(source)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: its config cannot be used: {reason_of(error)}.") from error


def check_prunable(source: Source) -> None:
    """Raise UserError for a model that cannot be pruned. Reads no weights, and of a GGUF file only the header."""
    if source.gguf is not None:
        check_gguf(source.name, source.directory / source.gguf)
        return
    config = read_config(source)
    family_of(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{source.name}: holds quantised weights, which cannot be pruned. Prune the original model.")


def load_prunable(source: Source, dtype: str, device: str, weight_format: WeightFormat = "full") -> PrunableModel:
    """Load a model as `load_model` does. Raises UserError also for a family that is not supported."""
    return PrunableModel.of(load_model(source, dtype, device, weight_format))


def load_model(source: Source, dtype: str, device: str, weight_format: WeightFormat = "full") -> nn.Module:
    """Load a causal model for forward passes: eval mode, no gradients, in `dtype` ("auto": as stored), on `device`.

    device: auto (one GPU, or as many as the weights need, or the CPU), a torch device, or a comma-separated list of
    them over which the layers are spread in order (several need accelerate). weight_format: int8 and fp8 round the
    prunable projections, each as it is read; a GGUF file is unpacked as a whole in main memory first. Raises UserError
    if the weights or the device are not available.
    """
    devices = devices_of(device)
    _check_files(source)
    empty = _build_empty(source, dtype)
    _refuse_oversized_config(source, empty)
    if device == "auto" and len(devices) > 1:
        devices = _first_devices_needed(empty, weight_format, devices)
    if weight_format == "full":
        model = _read(source, dtype, devices)
    else:
        model = _read_quantized(source, empty, devices, weight_format)
    _refuse_non_finite(source, model)
    return model.eval().requires_grad_(False)


def empty_model(name: str, dtype: str, weight_format: WeightFormat = "full") -> PrunableModel:
    """Return the model as `load_prunable` would, without weights on the meta device ("auto": the config's dtype).

    For a model on the hub only the config is downloaded. Raises UserError if no config can be read.
    """
    model = _build_empty(resolve(name, weights=False), dtype)
    if weight_format != "full":
        quantize_projections(model, weight_format)
    return PrunableModel.of(model)


def load_tokenizer(source: Source) -> Any:
    """Return the model's tokenizer. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (else transformers asks to run a copy)

    _check_files(source)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # dozens of kinds, see above
        raise UserError(f"{source.name}: its tokenizer cannot be loaded: {reason_of(error)}.") from error


def stored_weights(source: Source, path: Path) -> int:
    """Return how many weights one file of a model holds. Raises UserError for a damaged file, naming it."""
    from safetensors import SafetensorError, safe_open

    if source.gguf is not None:
        return read_header(path).weights
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors ({error}). Fetch the model's files again.") from None


def reason_of(error: Exception) -> str:
    """Return why a loader failed, in words that fit this program: it has no argument `trust_remote_code`."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), which pgprune does not run"
    return in_short(error)


# --- reading weights


def _read(source: Source, dtype: str, devices: list[torch.device]) -> nn.Module:
    """Let transformers read the files. Raises UserError if they do not match the config."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (registers the classes of exported models)

    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    arguments |= {"use_safetensors": True, "trust_remote_code": False}
    arguments["ignore_mismatched_sizes"] = True  # they are refused below, by name
    if source.gguf is not None:
        arguments.update(_gguf_arguments(source.gguf))
    if len(devices) > 1:
        arguments["device_map"] = _device_map(read_config(source), devices)
    elif devices[0].type == "cuda" and find_spec("accelerate"):
        arguments["device_map"] = {"": devices[0]}  # tensor by tensor, never all of them in main memory
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of everything that does not match precedes our error message
    logging.disable_progress_bar()
    # The GGUF reader draws a bar of its own, on a terminal or not.
    silence = redirect_stderr(StringIO()) if source.gguf else nullcontext()
    try:
        with silence:
            model, info = AutoModelForCausalLM.from_pretrained(source.directory, output_loading_info=True, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: cannot be loaded: {reason_of(error)}.") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    _refuse_mismatches(source, info["missing_keys"], info["mismatched_keys"])
    causal: nn.Module = model
    return causal.to(devices[0]) if len(devices) == 1 else causal


def _read_quantized(
    source: Source, empty: nn.Module, devices: list[torch.device], weight_format: Literal["int8", "fp8"]
) -> nn.Module:
    """Fill an empty model, rounding each tensor on its device before the next is read; a GGUF file as a whole.

    Raises UserError as `_read` does, and if a device cannot multiply fp8.
    """
    model: Any = empty
    dtype = next(empty.parameters()).dtype
    if weight_format == "fp8":
        for device in devices:
            check_fp8(device, dtype)
    if source.gguf is not None:
        unpacked = _read(source, str(dtype).removeprefix("torch."), [torch.device("cpu")])
        quantize_projections(unpacked, weight_format)
        return _place(unpacked, devices)
    family = family_of_export(model.config.model_type)
    tensors = dict(empty.state_dict())
    quantize_projections(empty, weight_format)
    stored = _fill_from_files(source, empty, tensors, _device_map(model.config, devices))
    tied = model.config.tie_word_embeddings
    _refuse_mismatches(source, tensors.keys() - stored - ({family.head_weight} if tied else set()), ())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # As in transformers, a stored head that differs from the embedding is not tied, whatever the config says.
    if tied and (family.head_weight not in stored or torch.equal(head.weight, embedding.weight)):
        head.weight = embedding.weight
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(devices[0])  # computed, so in no file
    return _place(empty, devices)


def _fill_from_files(
    source: Source, model: nn.Module, tensors: dict[str, Tensor], places: dict[str, torch.device]
) -> set[str]:
    """Fill a model with the tensors of its files. Returns their names; raises UserError for a shape that differs."""
    from safetensors import safe_open

    stored, mismatched = set(), []
    for path in source.weight_files():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in tensors:  # transformers ignores these as well
                    continue
                stored.add(name)
                shape, expected = tuple(file.get_slice(name).get_shape()), tensors[name]
                if shape != expected.shape:
                    mismatched.append((name, shape, expected.shape))
                    continue
                device = next(device for module, device in places.items() if name.startswith(f"{module}."))
                _fill(model, name, file.get_tensor(name).to(device, expected.dtype))
    _refuse_mismatches(source, (), mismatched)
    return stored


def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor of the files where an empty model has none yet."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantizedLinear) and key == "weight":
        module.fill(tensor)
    else:
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))


def _place(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """Move a model to its device, or spread its layers over several as transformers does."""
    if len(devices) == 1:
        return model.to(devices[0])
    if not find_spec("accelerate"):
        raise UserError(
            "device: several devices need accelerate, which is not installed. pip install 'pgprune[multi-gpu]'"
        )
    from accelerate import dispatch_model

    causal: Any = model
    placed: nn.Module = dispatch_model(model, _device_map(causal.config, devices))
    return placed


def _device_map(config: Any, devices: list[torch.device]) -> dict[str, torch.device]:
    family = family_of_export(config.model_type)
    return device_map(family, config.num_hidden_layers, config.tie_word_embeddings, devices)


def _first_devices_needed(
    empty: nn.Module, weight_format: WeightFormat, devices: list[torch.device]
) -> list[torch.device]:
    """Return the first of the devices: as many as the weights of an empty model need."""
    if weight_format != "full":
        empty = copy.deepcopy(empty)
        quantize_projections(empty, weight_format)
    free = [torch.cuda.mem_get_info(device)[0] for device in devices]
    return devices[: devices_needed(sum(parameter.nbytes for parameter in empty.parameters()), free)]


def _build_empty(source: Source, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    name = str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=getattr(torch, name))
    except Exception as error:  # dozens of kinds, see above
        raise UserError(f"{source.name}: no model can be built from its config: {reason_of(error)}.") from error
    return model.eval().requires_grad_(False)


def _gguf_arguments(file: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"gguf_file": file}
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions of transformers always unpack GGUF weights
        return arguments
    return arguments | {"quantization_config": GgufConfig(dequantize=True)}


# --- refusals


def _check_files(source: Source) -> None:
    """Raise UserError for files that transformers must not get: it trusts everything a config or header says."""
    if source.gguf is None:
        check_directory(source.name, source.directory)
    else:
        check_gguf(source.name, source.directory / source.gguf)


def _refuse_mismatches(source: Source, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise UserError for weights of other shapes than the config's, and for missing ones."""
    if by_name := sorted(mismatched):
        name, stored, expected = by_name[0]
        raise UserError(
            f"{source.name}: {_count(by_name, 'weight')} of another shape than config.json says. The first is {name}, "
            f"{tuple(stored)} instead of {tuple(expected)}. Fetch the model's files again."
        )
    if names := sorted(missing):
        raise UserError(
            f"{source.name}: {_count(names, 'weight')} missing from its files. The first is {names[0]}. "
            "Fetch the model's files again."
        )


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun} is" if len(items) == 1 else f"{len(items)} {noun}s are"


def _refuse_oversized_config(source: Source, model: nn.Module) -> None:
    """Raise UserError for a config far larger than the stored weights: transformers would make up gigabytes of them.

    If only some weights are missing, they are named later.
    """
    causal: Any = model
    stored = sum(stored_weights(source, path) for path in source.weight_files())
    configured = sum(parameter.numel() for parameter in model.parameters())
    quantised = getattr(causal.config, "quantization_config", None) is not None  # several weights are stored as one
    if configured > 2 * stored and not quantised:
        raise UserError(
            f"{source.name}: config.json describes {configured:,} weights, but the files hold only {stored:,}. "
            "Fetch the model's files again."
        )


def _refuse_non_finite(source: Source, model: nn.Module) -> None:
    for name, weight in model.named_parameters():  # rounded weights show it in their scales
        if not weight.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            hint = " Or a weight exceeds float16: set dtype to bfloat16 or float32." if dtype == "float16" else ""
            raise UserError(f"{source.name}: {name} holds NaN or infinity. Fetch the model's files again.{hint}")
