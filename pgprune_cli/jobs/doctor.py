"""doctor: check whether this machine has what a run needs, and say what to do about what is missing.

Nothing is downloaded: for a model or data set on the hub, only its description is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.errors import UserError
from pgprune_cli.jobs.machine import Finding, Status, finding, free_memory, gigabytes, machine_findings

if TYPE_CHECKING:
    from torch import device

    from pgprune_cli.data.corpora import Purpose
    from pgprune_cli.model.source import Source
    from pgprune_cli.recipe.schema import Recipe

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HUB_TIMEOUT = 10
"""Seconds to wait for the hub."""


def doctor(recipe: Recipe | None = None) -> list[Finding]:
    """Check the machine and, if a recipe is given, whether its model and data can be used here."""
    findings = machine_findings()
    return [*findings, *_model(recipe), *_data(recipe)] if recipe else findings


@dataclass(frozen=True)
class _Weights:
    """The size of a model: its number of parameters, and the bytes of its weight files."""

    parameters: int
    file_bytes: int


def _model(recipe: Recipe) -> Iterator[Finding]:
    """Check whether the recipe's model can be loaded and pruned, and whether its weights fit into memory."""
    from pgprune_cli.model.devices import devices_of
    from pgprune_cli.model.loading import check_prunable
    from pgprune_cli.run.settled import with_dtype

    try:
        devices = devices_of(recipe.device)
        recipe = with_dtype(recipe)
        source = _local_source(recipe.model)
        if source is not None:
            check_prunable(source, recipe.units.families)
        weights = _local_weights(source) if source else _hub_weights(recipe.model)
    except UserError as error:
        yield finding("model", recipe.model, str(error))
        return
    where = "on this machine" if source else f"on the hub, {gigabytes(weights.file_bytes)} to download"
    yield finding("model", f"{recipe.model}, {weights.parameters / 1e6:,.0f} million parameters, {where}")
    yield _memory(recipe, weights, devices)
    if recipe.weight_format == "fp8":
        yield _fp8(recipe, devices)


def _memory(recipe: Recipe, weights: _Weights, devices: Iterable[device]) -> Finding:
    """Compare the size of the weights with the free memory of the devices."""
    if recipe.weight_format == "full":
        format = f"dtype {recipe.dtype}"
        needed = weights.parameters * BYTES.get(recipe.dtype, 0) or weights.file_bytes
    else:
        format, needed = recipe.weight_format, weights.parameters
    free = sum(free_memory(str(device)) for device in devices)
    state = f"the weights take {gigabytes(needed)} in {format}, {recipe.device} has {gigabytes(free)} free"
    ways = "Use a smaller model, dtype: bfloat16, weight_format: int8, or several devices (device: cuda:0,cuda:1)."
    return finding("memory", state, ways if needed > free else "")


def _fp8(recipe: Recipe, devices: Iterable[device]) -> Finding:
    """Check whether every device multiplies fp8 matrices."""
    import torch

    from pgprune_cli.model.quantized import check_fp8

    dtype = getattr(torch, "bfloat16" if recipe.dtype == "auto" else recipe.dtype)
    try:
        for device in devices:
            check_fp8(device, dtype)
    except UserError as error:
        return finding("fp8", "no fp8 matrix products", str(error))
    return finding("fp8", f"{recipe.device} multiplies fp8 matrices")


def _local_source(name: str) -> Source | None:
    """Return the model's files on this machine or in the hub cache, or None if it must be downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from pgprune_cli.model.source import find_local, resolve

    if (source := find_local(name)) is not None:
        return source
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return resolve(name)  # raises an error that says what is wrong with the name
    return resolve(str(Path(cached).parent)) if isinstance(cached, str) else None


def _local_weights(source: Source) -> _Weights:
    from pgprune_cli.model.loading import stored_weights

    files = source.weight_files()
    return _Weights(sum(stored_weights(source, path) for path in files), sum(path.stat().st_size for path in files))


def _hub_weights(name: str) -> _Weights:
    from huggingface_hub import HfApi

    info: Any = _ask_hub(name, lambda: HfApi().model_info(name, files_metadata=True, timeout=HUB_TIMEOUT))
    _ask_hub(name, lambda: HfApi().auth_check(name))  # the hub describes a gated model to everybody
    files = [file for file in info.siblings if file.rfilename.endswith(".safetensors")]
    if not files:
        raise UserError(
            "The repository holds no safetensors files. Convert its weights with scripts/convert_to_safetensors.py."
        )
    file_bytes = sum(file.size or 0 for file in files)
    return _Weights(info.safetensors.total if info.safetensors else file_bytes // 2, file_bytes)


def _data(recipe: Recipe) -> Iterator[Finding]:
    """Check every text of the recipe. A missing evaluation text is a warning: a search does not read it."""
    from pgprune_cli.recipe.schema import name_and_text

    yield _text(recipe.calibration.corpus, "calibration", "FAIL", "set calibration.corpus: FILE.")
    for name, corpus in map(name_and_text, recipe.evaluation.corpora):
        alternative = f"set evaluation.corpora: [{name}=FILE]. Only eval and compare read this text."
        yield _text(corpus, "evaluation", "WARN", alternative)


def _text(corpus: str, purpose: Purpose, status_if_missing: Status, alternative: str) -> Finding:
    """Check whether a text can be read: the first document of a local file, or the description of a data set."""
    from huggingface_hub import HfApi

    from pgprune_cli.data.corpora import NAMED, documents, hub_corpus

    is_local = corpus == "demo" or (corpus not in NAMED and Path(corpus).expanduser().exists())
    try:
        if not is_local:
            path = hub_corpus(corpus).path
            _ask_hub(path, lambda: HfApi().dataset_info(path, timeout=HUB_TIMEOUT), alternative)
        elif not next(documents(corpus, purpose), ""):
            raise UserError("It contains no text. Use another file.")
    except UserError as error:
        return Finding("data", status_if_missing, f"{corpus}, for {purpose}", str(error))
    return finding("data", f"{corpus}, for {purpose}, {'on this machine' if is_local else 'on the hub'}")


def _ask_hub(name: str, question: Callable[[], Any], alternative: str = "set model: PATH.") -> Any:
    """Return the hub's answer. Raises UserError with what to do if there is none.

    alternative: how to do without the hub, the end of a sentence that begins with "or".
    """
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return question()
    except GatedRepoError:
        raise UserError(f"Ask for access on https://huggingface.co/{name}, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: the hub has no such repository, or it is private. Check the name, or run: hf auth login"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(f"It is not cached, and HF_HUB_OFFLINE is set. Unset it, or {alternative}") from None
    except Exception as error:  # the network fails with dozens of types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"The hub cannot be reached ({reason}). Check the connection, or {alternative}") from None
