"""doctor: whether this machine has what a run needs, and what to do where it has not.

Nothing is downloaded: of what lies on the hub, only its description is asked for. Imports stay inside the functions, so
that a package that is broken is a finding and not a crash.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.errors import UserError

if TYPE_CHECKING:
    from torch import device

    from pgprune_cli.model.source import Source
    from pgprune_cli.recipe.schema import Recipe

ENOUGH_DISK = 2 * 10**9
"""Bytes: below this, not even a small model's run and its export fit."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TIMEOUT = 10
"""Seconds that the hub has to answer."""

FOR_DEVELOPERS = ("dev", "serving-tests")


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and how to mend it: "" where it is fine. `later`: a search does without."""

    name: str
    found: str
    fix: str = ""
    later: bool = False

    @property
    def fails(self) -> bool:
        """Whether a search would."""
        return bool(self.fix) and not self.later

    def text(self) -> str:
        """As the verb prints it."""
        line = f"{('MEND' if self.fails else 'note') if self.fix else 'ok':<5}{self.name:<10}{self.found}"
        return f"{line}\n{'':<15}→ {self.fix}" if self.fix else line


def doctor(recipe: Recipe | None = None) -> list[Finding]:
    """Of the machine, and with a recipe of its model and data, too."""
    findings = [_python(), *_packages(), *_torch(), *_disks(), *_hub()]
    return [*findings, *_model(recipe), *_data(recipe)] if recipe else findings


# --- the machine


def _python() -> Finding:
    found = f"{platform.python_version()}, {sys.executable}"
    return Finding("python", found, "" if sys.version_info >= (3, 11) else "install Python 3.11 or later")


def _packages() -> Iterator[Finding]:
    """What every verb needs, and what some do."""
    try:
        missing = _unmet("")
        yield Finding("packages", "; ".join(missing) or "all there", "pip install pgprune" if missing else "")
        yield _extras()
    except metadata.PackageNotFoundError:
        yield Finding("packages", "pgprune runs from its sources, and nobody knows what it needs", "pip install -e .")


def _extras() -> Finding:
    """None of them is needed by everyone, so none of them is at fault."""
    names = metadata.metadata("pgprune").get_all("Provides-Extra") or []
    absent = [name for name in names if name not in FOR_DEVELOPERS and _unmet(name)]
    there = [name for name in names if name not in FOR_DEVELOPERS and name not in absent]
    hint = f"; not: {', '.join(absent)} (pip install 'pgprune[{absent[0]}]')" if absent else ""
    return Finding("extras", (", ".join(there) or "none") + hint)


def _unmet(extra: str) -> list[str]:
    """The requirements of an extra, or of pgprune itself, that are not met."""
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, metadata.requires("pgprune") or []):
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if not extra or marker is not None:
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = ""
            if not version or not requirement.specifier.contains(version, prereleases=True):
                unmet.append(f"{requirement.name} {version or 'is absent'}, needed {requirement.specifier}")
    return unmet


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # of missing libraries, of a CPU too old …
        yield Finding("torch", " ".join(str(error).split())[:200], "pip install --force-reinstall torch")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding(f"cuda:{index}", f"{name}, {_gb(free)} of {_gb(total)} free")
    elif shutil.which("nvidia-smi"):
        built = torch.version.cuda
        why = (
            f"built for CUDA {built}, which the driver is too old for or does not show"
            if built
            else "built without CUDA"
        )
        yield Finding(
            "cuda", f"a driver is there, but torch {torch.__version__} is {why}", "see https://pytorch.org/get-started"
        )
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield Finding("memory", f"{_gb(_free_memory('cpu'))} free")


def _disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from pgprune_cli.data.tokens import cache_directory

    places = {"runs and models": Path.cwd(), "the hub's cache": Path(HF_HUB_CACHE), "tokens": cache_directory()}
    for what, place in places.items():
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        fix = ""
        if not os.access(there, os.W_OK):
            fix = f"nothing can be written into {there}: work in another directory, or set HF_HOME and PGPRUNE_CACHE"
        elif free < ENOUGH_DISK:
            fix = f"make room on the disk of {there}"
        yield Finding("disk", f"{_gb(free)} free for {what} ({place})", fix)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        yield Finding("hub", "offline (HF_HUB_OFFLINE): what is in the cache can be used, and local files")
    else:
        token = "logged in" if get_token() else "no login, which models behind a licence want (hf auth login)"
        yield Finding("hub", token)


# --- a recipe


@dataclass(frozen=True)
class _Weights:
    parameters: int
    stored: int
    """Bytes of the files."""


def _model(recipe: Recipe) -> Iterator[Finding]:
    from pgprune_cli.model.loading import check_prunable, devices_of

    try:
        devices = devices_of(recipe.device)
        source = _local(recipe.model)
        if source is not None:
            check_prunable(source)
        weights = _of_source(source) if source else _on_hub(recipe.model)
    except UserError as error:
        yield Finding("model", recipe.model, str(error))
        return
    where = "here" if source else f"on the hub, {_gb(weights.stored)} to download"
    yield Finding("model", f"{recipe.model}, {weights.parameters / 1e6:,.0f} million parameters, {where}")
    kept_in, needed = f"dtype {recipe.dtype}", weights.parameters * BYTES.get(recipe.dtype, 0) or weights.stored
    if recipe.weight_format != "full":
        kept_in, needed = recipe.weight_format, weights.parameters
    free = sum(_free_memory(str(device)) for device in devices)
    found = f"the weights in {kept_in} take {_gb(needed)} of {_gb(free)} on {recipe.device}; a search takes more"
    ways = "take a smaller model, dtype bfloat16, weights int8, or several devices (device: cuda:0,cuda:1)"
    fix = ways if needed > free else ""
    yield Finding("memory", found, fix)
    if recipe.weight_format == "fp8":
        yield _fp8(recipe, devices)


def _fp8(recipe: Recipe, devices: Iterable[device]) -> Finding:
    import torch

    from pgprune_cli.model.quantized import check_fp8

    dtype = getattr(torch, "bfloat16" if recipe.dtype == "auto" else recipe.dtype)
    try:
        for one in devices:
            check_fp8(one, dtype)
    except UserError as error:
        return Finding("fp8", "no products", str(error))
    return Finding("fp8", f"multiplied on {recipe.device}")


def _local(name: str) -> Source | None:
    """Where the model lies, on this machine or in the hub's cache; None where it must be downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from pgprune_cli.model.source import resolve

    if name == "demo" or Path(name).expanduser().exists():
        return resolve(name)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return resolve(name)  # which says what is wrong with the name
    return resolve(str(Path(cached).parent)) if isinstance(cached, str) else None


def _of_source(source: Source) -> _Weights:
    from pgprune_cli.model.loading import stored_weights

    files = source.weight_files()
    return _Weights(sum(stored_weights(source, path) for path in files), sum(path.stat().st_size for path in files))


def _on_hub(name: str) -> _Weights:
    from huggingface_hub import HfApi

    info: Any = _asked(name, lambda: HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT))
    _asked(name, lambda: HfApi().auth_check(name))  # of a gated model, everyone gets the description
    files = [file for file in info.siblings if file.rfilename.endswith(".safetensors")]
    if not files:
        raise UserError(
            "its repository holds no safetensors; scripts/convert_to_safetensors.py converts pickled weights"
        )
    stored = sum(file.size or 0 for file in files)
    return _Weights(info.safetensors.total if info.safetensors else stored // 2, stored)


def _data(recipe: Recipe) -> Iterator[Finding]:
    from huggingface_hub import HfApi

    from pgprune_cli.data.corpora import NAMED, Purpose, documents, hub_corpus
    from pgprune_cli.recipe.schema import name_and_text

    corpus = recipe.calibration.corpus
    wanted: list[tuple[str, Purpose, str]] = [(corpus, "calibration", "calibration.corpus: FILE")]
    for name, corpus in map(name_and_text, recipe.evaluation.corpora):
        wanted.append((corpus, "evaluation", f"evaluation.corpora: [{name}=FILE]; only eval and compare read it"))
    for corpus, purpose, instead in wanted:
        here = corpus == "demo" or (corpus not in NAMED and Path(corpus).expanduser().exists())
        try:
            if not here:
                path = hub_corpus(corpus).path
                _asked(path, lambda path=path: HfApi().dataset_info(path, timeout=TIMEOUT), instead)
            elif not next(documents(corpus, purpose), ""):
                raise UserError("holds no text; give another file")
        except UserError as error:
            yield Finding("data", f"{corpus}, for {purpose}", str(error), later=purpose == "evaluation")
        else:
            yield Finding("data", f"{corpus}, for {purpose}, {'here' if here else 'on the hub'}")


def _asked(name: str, question: Any, instead: str = "model: PATH") -> Any:
    """The hub's answer. Raises UserError with what to do where there is none; `instead`: of what lies there."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return question()
    except GatedRepoError:
        raise UserError(f"ask for access on https://huggingface.co/{name}, then: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError("there is no such repository, or it is private: check the name, or: hf auth login") from None
    except OfflineModeIsEnabled:
        raise UserError(f"not in the cache, and HF_HUB_OFFLINE is set: unset it, or {instead}") from None
    except Exception as error:  # of the network, in dozens of kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the hub cannot be reached ({reason}): connect, or {instead}") from None


def _free_memory(device: str) -> int:
    """Bytes that are free on a device."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
