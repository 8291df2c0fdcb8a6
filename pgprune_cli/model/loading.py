"""From a model's files to its config, its weights and its tokenizer.

Only safetensors and GGUF are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from pgprune_cli.errors import UserError
from pgprune_cli.model import gguf_config
from pgprune_cli.model.devices import devices_of, emptiest, free_bytes
from pgprune_cli.model.families import model_type_of_gguf, refuse_units
from pgprune_cli.model.families.wrapper import decoder_config
from pgprune_cli.model.fingerprint import TOKENIZER_FILES
from pgprune_cli.model.gguf_header import read_header
from pgprune_cli.model.plain_tokenizer import write_plain
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections
from pgprune_cli.model.safety import check_directory, check_gguf
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.model.stored import refuse_incomplete, stored_files
from pgprune_cli.model.weights import read_quantized, read_weights, reason_of
from pgprune_cli.storage.records import write_json

WeightFormat = Literal["full", "int8", "fp8"]
"""How the prunable projections are stored in memory: in the model's dtype, or in one byte per weight (quantized.py)."""
CHECKED_AT_ONCE = 1 << 26
"""How many weights are searched for NaN at once, which takes five bytes for each of them beside the model."""


def read_config(source: Source) -> Any:
    """Return the model's transformers config; for a model of text and images that of its decoder.

    Raises UserError if it cannot be read, or would need code of its own.
    """
    from transformers import AutoConfig

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (registers the classes of exported models)

    _check_files(source)
    arguments = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=False, **arguments)
    except Exception as error:  # the loaders raise dozens of kinds for files that are not what they should be
        raise UserError(f"{source.name}: its config cannot be used: {reason_of(error)}.") from error
    if source.gguf is not None:
        path = source.directory / source.gguf
        gguf_config.complete(config, source.name, path, read_header(path))
    return decoder_config(config)


def model_type_of(source: Source) -> str:
    """Return the model type that transformers gives a model. For a GGUF file, only the header is read."""
    if source.gguf is None:
        return str(read_config(source).model_type)
    return model_type_of_gguf(read_header(source.directory / source.gguf).architecture)


def check_prunable(source: Source, families: Sequence[str] = ()) -> None:
    """Raise UserError for a model that cannot be pruned and exported. Reads only the headers of its weight files.

    families: of the units that are to be removed, as `units.families` has them.
    """
    if source.gguf is not None:
        path = source.directory / source.gguf
        check_gguf(source.name, path)
        refuse_units(model_type_of_gguf(read_header(path).architecture), families)
        return
    config = read_config(source)
    refuse_units(config.model_type, families)
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        advice = "Prune the original model."
        if quantization.get("quant_method") == "mxfp4":  # transformers can unpack it, on a CPU too
            advice = (
                "Unpack them first: AutoModelForCausalLM.from_pretrained(NAME, quantization_config=Mxfp4Config("
                "dequantize=True)).save_pretrained(DIRECTORY), and save the tokenizer there, too."
            )
        raise UserError(f"{source.name}: holds quantised weights, which cannot be pruned. {advice}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            f"{source.name}: its tokens attend in both directions, as in an embedding model. pgprune prunes causal "
            "language models."
        )
    model = PrunableModel.of(_build_empty(source, "auto"))
    if source.has_weights:
        refuse_incomplete(source.name, stored_files(source, model.module), model)


def load_prunable(
    source: Source, dtype: str, device: str | Sequence[torch.device], weight_format: WeightFormat = "full"
) -> PrunableModel:
    """Load a model as `load_model` does. Raises UserError also for a family that is not supported."""
    return PrunableModel.of(load_model(source, dtype, device, weight_format))


def load_model(
    source: Source,
    dtype: str,
    device: str | Sequence[torch.device],
    weight_format: WeightFormat = "full",
    *,
    beside_another: bool = False,
) -> nn.Module:
    """Load a causal model for forward passes: eval mode, no gradients, in `dtype` ("auto": as stored), on `device`.

    device: auto (the emptiest GPU, or as many as the weights need, or the CPU), a torch device, or a list of them, as
    text with commas or as a sequence, over which the layers are spread in order (several need accelerate).
    weight_format: int8 and fp8 round the prunable projections, each as it is read; a GGUF file is unpacked as a whole
    in main memory first. beside_another: auto leaves the first of several GPUs to another model.

    Raises UserError if the weights or the device are not available.
    """
    devices = devices_of(device) if isinstance(device, str) else list(device)
    _check_files(source)
    empty = _build_empty(source, dtype)
    check_weights(source, empty)
    if device == "auto" and len(devices) > 1:
        devices = _emptiest_devices(empty, weight_format, devices[1:] if beside_another else devices)
    if weight_format == "full":
        model = read_weights(source, empty, dtype, devices)
    else:
        model = read_quantized(source, empty, devices, weight_format)
    _refuse_non_finite(source, model)
    return model.eval().requires_grad_(False)


def empty_model(name: str, dtype: str, weight_format: WeightFormat = "full") -> PrunableModel:
    """Return the model as `load_prunable` would, without weights on the meta device ("auto": the config's dtype).

    For a model on the hub only the config is downloaded. Raises UserError if no config can be read.
    """
    return empty_prunable(resolve(name, weights=False), dtype, weight_format)


def empty_prunable(source: Source, dtype: str, weight_format: WeightFormat = "full") -> PrunableModel:
    """Return the model whose config is in `source` without weights, as `empty_model` does."""
    model = _build_empty(source, dtype)
    if weight_format != "full":
        quantize_projections(model, weight_format)
    return PrunableModel.of(model)


def load_tokenizer(source: Source) -> Any:
    """Return the model's tokenizer. Raises UserError if there is none, or none of the classes of transformers.

    That of a GGUF file is loaded as if it lay in the directory of a model of its type, as it will in an export:
    transformers takes another class then for some types, whose token ids differ.
    """
    from transformers import AutoTokenizer

    from pgprune_cli.serving import modeling_pruned  # noqa: F401  (else transformers asks to run a copy)

    _check_files(source)
    if source.gguf is None and not any(any(source.directory.glob(pattern)) for pattern in TOKENIZER_FILES):
        # Some versions of transformers would make up an empty one.
        raise UserError(f"{source.name}: has no tokenizer. Copy tokenizer.json or tokenizer.model there.")
    arguments = {"trust_remote_code": False} | _without_mistral_common()
    try:
        if source.gguf is None:
            tokenizer = AutoTokenizer.from_pretrained(source.directory, **arguments)
        else:
            tokenizer = _tokenizer_of_gguf(source, arguments)
    except Exception as error:  # dozens of kinds, see above
        raise UserError(f"{source.name}: its tokenizer cannot be loaded: {reason_of(error)}.") from error
    if not hasattr(tokenizer, "added_tokens_decoder"):
        raise UserError(
            f"{source.name}: its tokenizer is a {type(tokenizer).__name__}, which does not say what pgprune needs. "
            "Run: pip uninstall mistral-common"
        )
    return tokenizer


def _tokenizer_of_gguf(source: Source, arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.directory, gguf_file=source.gguf, **arguments)
    with TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save_pretrained(directory)
        write_plain(tokenizer, directory)
        write_json(directory / "config.json", {"model_type": model_type_of(source)})
        return AutoTokenizer.from_pretrained(directory, **arguments)


def _without_mistral_common() -> dict[str, Any]:
    """Return the argument that makes transformers load the tokenizer of a Mistral with its own classes.

    If the package mistral-common is installed, it would take that package's for a model with tekken.json. Older
    versions do not know the argument.
    """
    from transformers.models.auto import tokenization_auto

    return {"mistral_format": False} if hasattr(tokenization_auto, "_use_mistral_format") else {}


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


def check_weights(source: Source, model: nn.Module) -> int:
    """Return how many weights the files of a model hold. Reads the headers only.

    model: built from its config, without weights. Raises UserError for missing or damaged files, and for a config far
    larger than the stored weights: transformers would make up gigabytes of them. If only some weights are missing,
    they are named later. Those of a GGUF file have other names, so all must be there.
    """
    causal: Any = model
    stored = sum(stored_weights(source, path) for path in source.weight_files())
    configured = sum(parameter.numel() for parameter in model.parameters())
    quantised = getattr(causal.config, "quantization_config", None) is not None  # several weights are stored as one
    if configured > (stored if source.gguf else 2 * stored) and not quantised:
        place = "its header" if source.gguf else "config.json"
        raise UserError(
            f"{source.name}: {place} describes {configured:,} weights, but the files hold only {stored:,}. "
            "Fetch the model's files again."
        )
    return stored


def _emptiest_devices(empty: nn.Module, weight_format: WeightFormat, devices: list[torch.device]) -> list[torch.device]:
    """Return the emptiest of the devices: as many as the weights of an empty model need."""
    if weight_format != "full":
        empty = copy.deepcopy(empty)
        quantize_projections(empty, weight_format)
    weights = sum(parameter.nbytes for parameter in empty.parameters())
    return [devices[index] for index in emptiest([*map(free_bytes, devices)], weights)]


def eager_if_capped(config: Any) -> dict[str, str]:
    """Return how transformers has to build or load a model with soft-capping: with eager attention.

    Up to 5.20 it lets PyTorch's attention ignore soft-capping, without a word.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def stored_dtype(config: Any) -> torch.dtype:
    """Return the dtype in which a model's weights are stored, as its config says."""
    dtype: torch.dtype = getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    return dtype


def _build_empty(source: Source, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    chosen = stored_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=chosen, **eager_if_capped(config))
    except Exception as error:  # dozens of kinds, see above
        raise UserError(f"{source.name}: no model can be built from its config: {reason_of(error)}.") from error
    return model.eval().requires_grad_(False)


def _check_files(source: Source) -> None:
    """Raise UserError for files that transformers must not get: it trusts everything a config or header says."""
    if source.gguf is None:
        check_directory(source.directory)
    else:
        check_gguf(source.name, source.directory / source.gguf)


def _refuse_non_finite(source: Source, model: nn.Module) -> None:
    for name, weight in model.named_parameters():  # rounded weights show it in their scales
        parts = weight.flatten().split(CHECKED_AT_ONCE)
        if not all(bool(part.isfinite().all()) for part in parts):
            dtype = str(weight.dtype).removeprefix("torch.")
            hint = " Or a weight exceeds float16: set dtype to bfloat16 or float32." if dtype == "float16" else ""
            raise UserError(f"{source.name}: {name} holds NaN or infinity. Fetch the model's files again.{hint}")
