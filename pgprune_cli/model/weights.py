"""Read the weights of a model's files: by transformers as they are, or tensor by tensor into 8 bits."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgprune_cli.errors import UserError, in_short
from pgprune_cli.model.devices import device_map
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import dense_config
from pgprune_cli.model.families.wrapper import PREFIXES
from pgprune_cli.model.out_of_memory import is_out_of_memory
from pgprune_cli.model.quantized import QuantizedLinear, check_fp8, quantize_projections
from pgprune_cli.model.safety import without_adapter
from pgprune_cli.model.source import Source
from pgprune_cli.model.stored import StoredFile, stored_files

NO_ACCELERATE = "device: several devices need accelerate. Install it with: pip install 'pgprune[multi-gpu]'"


def read_weights(source: Source, empty: nn.Module, dtype: str, devices: list[torch.device]) -> nn.Module:
    """Let transformers read the files. Raises UserError if they do not match the config.

    empty: the model without weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (registers the classes of exported models)

    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    arguments |= {"use_safetensors": True, "trust_remote_code": False}
    arguments["ignore_mismatched_sizes"] = True  # they are refused below, by name
    causal_empty: Any = empty
    if causal_empty.config._attn_implementation == "eager":
        arguments["attn_implementation"] = "eager"
    if source.is_wrapped or source.gguf is not None:  # transformers would read a whole GGUF file once more
        arguments["config"] = copy.deepcopy(causal_empty.config)
    if source.is_wrapped:
        arguments["key_mapping"] = {f"^{re.escape(stored)}": name for stored, name in PREFIXES}
    if source.gguf is not None:
        arguments.update(_gguf_arguments(source.gguf))
    if len(devices) > 1:
        arguments["device_map"] = _device_map(empty, devices)
    elif devices[0].type == "cuda" and find_spec("accelerate"):
        arguments["device_map"] = {"": devices[0]}  # tensor by tensor, never all of them in main memory
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of everything that does not match precedes our error message
    logging.disable_progress_bar()
    # The GGUF reader draws a bar of its own, on a terminal or not.
    silence = redirect_stderr(StringIO()) if source.gguf else nullcontext()
    try:
        with silence, without_adapter(source.directory) as directory:
            model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        if is_out_of_memory(error):
            raise
        raise UserError(f"{source.name}: cannot be loaded: {reason_of(error)}.") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    causal: nn.Module = model
    _refuse_mismatches(source, info["missing_keys"], [*info["mismatched_keys"], *_other_shapes(causal, empty)])
    return causal.to(devices[0]) if len(devices) == 1 else causal


def _other_shapes(model: nn.Module, empty: nn.Module) -> Iterator[tuple[str, torch.Size, torch.Size]]:
    """Yield the weights that do not have the shape that the config says: name, shape, and the right one.

    transformers 5.18 takes them from GGUF files as they are.
    """
    expected = {name: parameter.shape for name, parameter in empty.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.shape != expected.get(name, parameter.shape):
            yield name, parameter.shape, expected[name]


def read_quantized(
    source: Source, empty: nn.Module, devices: list[torch.device], weight_format: Literal["int8", "fp8"]
) -> nn.Module:
    """Fill an empty model, rounding each tensor on its device before the next is read; a GGUF file as a whole.

    Raises UserError as `read_weights` does, and if a device cannot multiply fp8.
    """
    model: Any = empty
    dtype = next(empty.parameters()).dtype
    if weight_format == "fp8":
        for device in devices:
            check_fp8(device, dtype)
    if source.gguf is not None:
        unpacked = read_weights(source, empty, str(dtype).removeprefix("torch."), [torch.device("cpu")])
        quantize_projections(unpacked, weight_format)
        return _place(unpacked, devices)
    family = family_of(model.config.model_type)
    tensors, files = dict(empty.state_dict()), stored_files(source, empty)
    quantize_projections(empty, weight_format)
    stored = _fill_from_files(source, files, empty, tensors, _device_map(empty, devices))
    tied = model.config.tie_word_embeddings
    _refuse_mismatches(source, tensors.keys() - stored - ({family.head_weight} if tied else set()), ())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # As in transformers, a stored head that differs from the embedding is not tied, whatever the config says.
    if tied and (family.head_weight not in stored or torch.equal(head.weight, embedding.weight)):
        head.weight = embedding.weight
    # Computed, so in no file: the rotary frequencies, and what some embeddings are multiplied with.
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=dense_config(model.config)).to(devices[0])
    if (scale := getattr(embedding, "scalar_embed_scale", None)) is not None:
        embedding.embed_scale = torch.tensor(scale)
    return _place(empty, devices)


def reason_of(error: Exception) -> str:
    """Return why a loader failed, in words that fit this program: it has no argument `trust_remote_code`."""
    if "trust_remote_code" in str(error):
        return "it needs custom code (auto_map), which pgprune does not run"
    return in_short(error)


def _fill_from_files(
    source: Source,
    files: Sequence[StoredFile],
    model: nn.Module,
    tensors: dict[str, Tensor],
    places: dict[str, torch.device],
) -> set[str]:
    """Fill a model with the tensors of its files. Returns their names; raises UserError for a shape that differs."""
    stored, mismatched = set(), []
    for file in files:
        with file.open() as read:
            for name in file.tensors.keys() & tensors.keys():  # transformers ignores others as well
                stored.add(name)
                shape, expected = file.tensors[name].shape, tensors[name]
                if shape != expected.shape:
                    mismatched.append((name, shape, expected.shape))
                    continue
                device = next(device for module, device in places.items() if name.startswith(f"{module}."))
                _fill(model, name, read(name).to(device, expected.dtype))
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
        raise UserError(NO_ACCELERATE)
    from accelerate import dispatch_model

    placed: nn.Module = dispatch_model(model, _device_map(model, devices))
    return placed


def _device_map(model: nn.Module, devices: list[torch.device]) -> dict[str, torch.device]:
    causal: Any = model
    config = causal.config
    family = family_of(config.model_type)
    return device_map(family, config.num_hidden_layers, config.tie_word_embeddings, devices)


def _gguf_arguments(file: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"gguf_file": file}
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions of transformers always unpack GGUF weights
        return arguments
    return arguments | {"quantization_config": GgufConfig(dequantize=True)}


def _refuse_mismatches(source: Source, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise UserError for weights of other shapes than the config's, and for missing ones."""
    if by_name := sorted(mismatched):
        name, stored, expected = by_name[0]
        raise UserError(
            f"{source.name}: {_count(by_name, 'weight')} not of the shape that config.json gives. The first is {name}: "
            f"{tuple(stored)} instead of {tuple(expected)}. Fetch the model's files again."
        )
    if names := sorted(missing):
        raise UserError(
            f"{source.name}: {_count(names, 'weight')} missing from its files. The first is {names[0]}. "
            "Fetch the model's files again."
        )


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun} is" if len(items) == 1 else f"{len(items)} {noun}s are"
