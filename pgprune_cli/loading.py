"""From a model's files to its config, its weights and its tokenizer.

Only safetensors and GGUF are read, and no code that comes with a model is run.
"""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgprune_cli.arch import spec_of
from pgprune_cli.devices import devices_of, enough, spread
from pgprune_cli.errors import UserError, in_short
from pgprune_cli.source import Source, resolve
from pgprune_cli.trust import check_directory


def read_config(source: Source) -> Any:
    """What transformers reads the model's config as. Raises UserError where it cannot, or would run code for it."""
    from transformers import AutoConfig

    from pgprune_cli.writers import modeling_pruned  # noqa: F401  (makes our own exported models loadable)

    check_directory(source.name, source.directory)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: its config cannot be used: {reason_of(error)}") from error


def check_prunable(source: Source) -> None:
    """Raises UserError for a model that no search could end well on; reads no weights, and of GGUF files nothing."""
    if source.gguf is not None:
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
    check_directory(source.name, source.directory)
    files = source.weight_files()
    if source.gguf is None:
        for path in files:
            _refuse_cut(path)
    else:
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

    check_directory(source.name, source.directory)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # of dozens of kinds, see above
        raise UserError(f"{source.name}: its tokenizer cannot be loaded: {reason_of(error)}") from error


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


def reason_of(error: Exception) -> str:
    """Why a loader failed; it would ask for an argument that users have not."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), and none is run"
    if "model type `deci`" in str(error):
        return "layers of different sizes in a GGUF file are for llama.cpp; name the run, or its export as --format hf"
    return in_short(error)
