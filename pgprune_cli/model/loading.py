"""From a model's files to its config, its weights and its tokenizer.

Only safetensors and GGUF are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgprune_cli.errors import UserError, in_short
from pgprune_cli.model.devices import devices_of, enough, spread
from pgprune_cli.model.gguf_header import read_header
from pgprune_cli.model.prunable import spec_of
from pgprune_cli.model.quantized import QuantizedLinear, check_fp8, quantize_projections
from pgprune_cli.model.safety import check_directory, check_gguf
from pgprune_cli.model.source import Source, resolve

Weights = Literal["full", "int8", "fp8"]
"""What the prunable projections are kept in: the model's dtype, or one byte (eight_bit.py)."""

HEAD = "lm_head.weight"
"""The tensor that files of a model with tied embeddings may lack."""


def read_config(source: Source) -> Any:
    """What transformers reads the model's config as. Raises UserError where it cannot, or would run code for it."""
    from transformers import AutoConfig

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (makes our own exported models loadable)

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


def load_model(source: Source, dtype: str, device: str, weights: Weights = "full") -> nn.Module:
    """The model, ready for forward passes: eval mode, no gradients, in `dtype` ("auto": as stored) on `device`.

    `device` is auto (one GPU, or as many as the weights need, or the CPU where there is none), a torch device, or a
    comma-separated list of them over which the layers are spread in order (several need accelerate). `weights` of 8
    bits: the prunable projections are rounded (eight_bit.py), each as it is read; a GGUF file is unpacked as a whole
    first, in main memory. Raises UserError where the weights or the device are not to be had.
    """
    devices = devices_of(device)
    _check(source)
    empty = _empty(source, dtype)
    _refuse_sizes_beyond(source, empty)
    if device == "auto" and len(devices) > 1:
        devices = _as_many_as(empty, weights, devices)
    if weights == "full":
        model = _read(source, dtype, devices)
    else:
        model = _read_quantized(source, empty, devices, weights)
    _refuse_what_is_not_finite(source, model)
    return model.eval().requires_grad_(False)


def _read(source: Source, dtype: str, devices: list[torch.device]) -> nn.Module:
    """What transformers makes of the files. Raises UserError where they are not what the config says."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (makes our own exported models loadable)

    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    arguments |= {"use_safetensors": True, "trust_remote_code": False}
    arguments["ignore_mismatched_sizes"] = True  # which are refused below, by their names
    if source.gguf is not None:
        arguments.update(_gguf_arguments(source.gguf))
    if len(devices) > 1:
        arguments["device_map"] = _spread(read_config(source), devices)
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
    _refuse_what_does_not_fit(source, info["missing_keys"], info["mismatched_keys"])
    return model.to(devices[0]) if len(devices) == 1 else model


def _read_quantized(
    source: Source, model: nn.Module, devices: list[torch.device], weights: Literal["int8", "fp8"]
) -> nn.Module:
    """Into an empty model, each tensor rounded on its device before the next is read; a GGUF file as a whole.

    Raises UserError as `_read` does, and where a device has no products of fp8.
    """
    from safetensors import safe_open

    dtype = next(model.parameters()).dtype
    if weights == "fp8":
        for device in devices:
            check_fp8(device, dtype)
    if source.gguf is not None:
        model = _read(source, str(dtype).removeprefix("torch."), [torch.device("cpu")])
        quantize_projections(model, weights)
        return _placed(model, devices)
    tensors = dict(model.state_dict())
    places = _spread(model.config, devices)
    quantize_projections(model, weights)
    found, misfits = set(), []
    for path in source.weight_files():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in tensors:  # transformers, too, leaves alone what it has no place for
                    continue
                found.add(name)
                stored, wanted = tuple(file.get_slice(name).get_shape()), tensors[name]
                if stored == wanted.shape:
                    _fill(model, name, file.get_tensor(name).to(_place(places, name), wanted.dtype))
                else:
                    misfits.append((name, stored, wanted.shape))
    tied = model.config.tie_word_embeddings
    _refuse_what_does_not_fit(source, tensors.keys() - found - ({HEAD} if tied else set()), misfits)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # A head of its own that differs is not tied, whatever the config says: as transformers does.
    if tied and (HEAD not in found or torch.equal(head.weight, embedding.weight)):
        head.weight = embedding.weight
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(devices[0])  # computed, so in no file
    return _placed(model, devices)


def _spread(config: Any, devices: list[torch.device]) -> dict[str, torch.device]:
    return spread(config.num_hidden_layers, config.tie_word_embeddings, devices)


def _place(places: Mapping[str, torch.device], name: str) -> torch.device:
    return next(device for module, device in places.items() if name.startswith(f"{module}."))


def _placed(model: nn.Module, devices: list[torch.device]) -> nn.Module:
    """On its device, or with its layers spread over several as transformers does it when it loads."""
    if len(devices) == 1:
        return model.to(devices[0])
    if not find_spec("accelerate"):
        raise UserError("a model on several devices needs the extra: pip install 'pgprune[multi-gpu]'")
    from accelerate import dispatch_model

    return dispatch_model(model, _spread(model.config, devices))


def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor of the files where an empty model has none yet."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, QuantizedLinear) and key == "weight":
        module.fill(tensor)
    else:
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))


def _refuse_what_does_not_fit(
    source: Source, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]
) -> None:
    if misfits := sorted(mismatched):
        name, stored, wanted = misfits[0]
        raise UserError(
            f"{source.name}: {len(misfits)} weights do not fit its config: {name} has the shape {tuple(stored)}, and "
            f"by the config it should be {tuple(wanted)}"
        )
    if lacking := sorted(missing):  # which transformers makes up, with a warning
        raise UserError(f"{source.name}: its files lack {len(lacking)} weights, the first is {lacking[0]}")


def _as_many_as(empty: nn.Module, weights: Weights, devices: list[torch.device]) -> list[torch.device]:
    """Of the devices the first that the weights of an empty model need."""
    if weights != "full":
        empty = copy.deepcopy(empty)
        quantize_projections(empty, weights)
    free = [torch.cuda.mem_get_info(one)[0] for one in devices]
    return devices[: enough(sum(parameter.nbytes for parameter in empty.parameters()), free)]


def empty_model(name: str, dtype: str, weights: Weights = "full") -> nn.Module:
    """The model as `load_model` would load it, but on the meta device, without weights; "auto": as its config says.

    Of a model of the hub only the config is downloaded. Raises UserError where there is none that can be read.
    """
    model = _empty(resolve(name, weights=False), dtype)
    if weights != "full":
        quantize_projections(model, weights)
    return model


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


def _refuse_sizes_beyond(source: Source, model: nn.Module) -> None:
    """Raises UserError for a config of an (empty) model that is far larger than the weights stored for it: transformers
    would make up the rest, gigabytes of it. Where it lacks less, what it lacks is named later.
    """
    stored = sum(weights_in(source, path) for path in source.weight_files())
    wanted = sum(parameter.numel() for parameter in model.parameters())
    quantised = getattr(model.config, "quantization_config", None) is not None  # several weights are stored as one
    if wanted > 2 * stored and not quantised:
        raise UserError(f"{source.name}: by its config it has {wanted:,} weights, and its files hold {stored:,}")


def _refuse_what_is_not_finite(source: Source, model: nn.Module) -> None:
    for name, weight in model.named_parameters():  # of rounded weights it is their scale that shows it
        if not weight.isfinite().all():
            dtype = str(weight.dtype).removeprefix("torch.")
            more = "; or it has more than float16 holds: set dtype to bfloat16 or float32" if dtype == "float16" else ""
            raise UserError(f"{source.name}: {name} holds NaN or infinity: fetch the model's files again{more}")


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (or transformers would ask whether to run its copy)

    _check(source)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # of dozens of kinds, see above
        raise UserError(f"{source.name}: its tokenizer cannot be loaded: {reason_of(error)}") from error


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
    return in_short(error)
