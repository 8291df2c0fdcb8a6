"""doctor: check whether this machine has what a run needs, and say what to do about what is missing.

Whatever a search would be refused for is checked as the search does it (`search/checks.py`). Nothing is downloaded: for
a model or data set on the hub, only its description is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.errors import UserError
from pgprune_cli.jobs.machine import Finding, finding, free_memory, gigabytes, machine_findings
from pgprune_cli.model.safety import ADAPTER, MERGE
from pgprune_cli.run.layout import runs_folder

if TYPE_CHECKING:
    from pgprune_cli.data.corpora import Purpose
    from pgprune_cli.model.source import Source
    from pgprune_cli.recipe.schema import Recipe
    from pgprune_cli.search.checks import Check
    from pgprune_cli.search.preparation import Preparation

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HUB_TIMEOUT = 10
"""Seconds to wait for the hub."""


def doctor(recipe: Recipe | None = None, run: Path | None = None) -> list[Finding]:
    """Check the machine and, if a recipe is given, whether a search with it could begin here.

    run: the run directory of the search. Without a torch that works, only the machine is checked.
    """
    downloads = recipe is not None and _must_be_downloaded(recipe.model)
    findings = machine_findings(run or runs_folder(), downloads)
    torch_fails = any(found.fails for found in findings if found.name == "torch")
    return findings if recipe is None or torch_fails else [*findings, *_recipe(recipe, run)]


def _recipe(recipe: Recipe, run: Path | None) -> Iterator[Finding]:
    """Make the checks of a search. If the model must be downloaded first, make those that do not need its files."""
    from pgprune_cli.jobs.memory import SEARCH_CHECKS
    from pgprune_cli.search.preparation import Preparation

    if _must_be_downloaded(recipe.model):
        preparation = Preparation(recipe, run)
        yield from _findings(preparation, [check for check in SEARCH_CHECKS if check.needs == "machine"])
        yield from _model_on_hub(preparation)
        yield _text(recipe.calibration.corpus, "calibration")
        yield from _evaluation_texts(recipe)
        yield from _recovery(recipe)
        return
    preparation = Preparation(recipe, run, found=_cached(recipe.model))
    with preparation.parsed_once():
        yield from _findings(preparation, SEARCH_CHECKS, _text_on_hub(recipe.calibration.corpus))
    yield from _evaluation_texts(recipe)
    yield from _evaluation_windows(preparation)
    yield from _recovery(recipe)


def _findings(preparation: Preparation, checks: Iterable[Check], text: Finding | None = None) -> Iterator[Finding]:
    """Make checks of a search. One that fails for the same reason as one before it is left out.

    text: replaces the check of the text, if it is given.
    """
    reasons = set()
    for check in checks:
        try:
            yield (text if check.name == "text" else None) or finding(check.name, check.find(preparation))
        except UserError as error:
            if str(error) not in reasons:
                yield finding(check.name, check.subject(preparation), str(error))
            reasons.add(str(error))


# --- the model


@dataclass(frozen=True)
class _Weights:
    """The size of a model: its number of parameters, and the bytes of its weight files."""

    parameters: int
    file_bytes: int


def _must_be_downloaded(name: str) -> bool:
    """Return whether a search would download the model. False if it cannot, or does not find it: the checks say so."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from pgprune_cli.model.source import find_local

    try:
        return find_local(name, weights=False) is None and not HF_HUB_OFFLINE and _cached(name) is None
    except UserError:
        return False


def _cached(name: str) -> Source | None:
    """Return a model that is complete in the hub cache, else None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from pgprune_cli.model.source import find_local, resolve

    try:
        if find_local(name, weights=False) is not None:
            return None
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            return None
        source = resolve(str(Path(config).parent))
        source.weight_files()
        return source
    except (UserError, HFValidationError):
        return None


def _memory(preparation: Preparation, weights: _Weights) -> Finding:
    """Compare the size of the weights with the free memory of the devices. Raises UserError for a missing device."""
    recipe = preparation.recipe
    if recipe.weight_format == "full":
        format = f"dtype {recipe.dtype}"
        needed = weights.parameters * BYTES.get(recipe.dtype, 0) or weights.file_bytes
    else:
        format, needed = recipe.weight_format, weights.parameters
    free = sum(free_memory(str(device)) for device in preparation.devices)
    state = f"the weights take {gigabytes(needed)} in {format}, {recipe.device} has {gigabytes(free)} free"
    ways = "Use a smaller model, dtype: bfloat16, weight_format: int8, or several devices (device: cuda:0,cuda:1)."
    return finding("memory", state, ways if needed > free else "")


def _model_on_hub(preparation: Preparation) -> Iterator[Finding]:
    """Check what the hub says of a model that is not on this machine."""
    name = preparation.asked.model
    try:
        weights = _hub_weights(name)
        size = f"{weights.parameters / 1e6:,.0f} million parameters, {gigabytes(weights.file_bytes)}"
        yield finding("model", f"{name}, {size} to download from the hub. Its files are checked once they are here")
        yield _memory(preparation, weights)
    except UserError as error:
        yield finding("model", name, str(error))


def _hub_weights(name: str) -> _Weights:
    from huggingface_hub import HfApi

    from pgprune_cli.model.source import gguf_refusal

    info: Any = _ask_hub(name, lambda: HfApi().model_info(name, files_metadata=True, timeout=HUB_TIMEOUT))
    _ask_hub(name, lambda: HfApi().auth_check(name))  # the hub describes a gated model to everybody
    files = [file for file in info.siblings if fnmatch(file.rfilename, "model*.safetensors")]
    if not files and any(file.rfilename == ADAPTER for file in info.siblings):
        raise UserError(f"The repository holds an adapter, not a whole model. {MERGE}")
    if not files and any(file.rfilename.endswith(".gguf") for file in info.siblings):
        raise UserError(gguf_refusal(name))
    if not files:
        raise UserError(
            "The repository holds no safetensors files. Convert its weights, and set model to the directory: "
            f"pgprune convert {name} DIR"
        )
    file_bytes = sum(file.size or 0 for file in files)
    return _Weights(info.safetensors.total if info.safetensors else file_bytes // 2, file_bytes)


def _ask_hub(name: str, question: Callable[[], Any]) -> Any:
    """Return the hub's answer about a model. Raises UserError with what to do if there is none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return question()
    except GatedRepoError:
        raise UserError(f"Ask for access on https://huggingface.co/{name}, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: the hub has no such repository, or it is private. Check the name, or run: hf auth login"
        ) from None
    except Exception as error:  # the network fails with dozens of types
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"The hub cannot be reached ({reason}). Check the connection, or set model: PATH.") from None


# --- the texts


def _evaluation_texts(recipe: Recipe) -> Iterator[Finding]:
    """Check the texts that only `eval` and `compare` read: if one is missing, that is a warning."""
    from pgprune_cli.recipe.schema import name_and_text

    for _, corpus in map(name_and_text, recipe.evaluation.corpora):
        found = _text(corpus, "evaluation")
        fix = f"{found.fix} Only eval and compare read this text."
        yield Finding(found.name, "WARN", found.state, fix) if found.fails else found


def _recovery(recipe: Recipe) -> Iterator[Finding]:
    """Check what only `recover` needs: its packages and its text. What is missing is a warning."""
    from pgprune_cli.jobs.recovery_request import missing_packages
    from pgprune_cli.recover.texts import refuse_evaluation_text

    missing = missing_packages(recipe)
    state = f"recover.train {recipe.recover.train}" + (f", but {' and '.join(missing)} is missing" if missing else "")
    fix = "Only recover needs this. Install it: pip install 'pgprune[recovery]'"
    yield Finding("recovery", "WARN", state, fix) if missing else finding("recovery", state)
    corpus = recipe.recover.corpus
    try:
        refuse_evaluation_text(recipe)
        if not corpus:
            return
        found = _conversations(recipe) or _text(corpus, "calibration")
    except UserError as error:
        found = finding("text", f"{corpus or recipe.calibration.corpus}, for the recovery", str(error))
    fix = f"{found.fix} Only recover reads this text."
    yield Finding(found.name, "WARN", found.state, fix) if found.fails else found


def _conversations(recipe: Recipe) -> Finding | None:
    """Check whether the text of a recovery has conversations, if it should. Raises UserError if it has none."""
    from pgprune_cli.data.conversations import conversations, holds_conversations

    corpus = recipe.recover.corpus
    if recipe.recover.turns == "all" and not holds_conversations(corpus):
        return None
    if on_hub := _text_on_hub(corpus):
        return on_hub
    if next(conversations(corpus, "calibration"), None) is None:
        raise UserError(f"{corpus}: it contains no conversations.")
    return finding("text", f"{corpus}, for the recovery, on this machine")


def _evaluation_windows(preparation: Preparation) -> Iterator[Finding]:
    """Warn of windows that `eval` and `compare` shorten, because the model's context is shorter."""
    from pgprune_cli.model.context import longest_context

    try:
        longest = longest_context(preparation.empty.config)
    except UserError:  # reported by a check
        return
    longer = [length for length in preparation.asked.evaluation.seqlen if longest is not None and length > longest]
    if longer:
        state = f"evaluation.seqlen {', '.join(map(str, longer))}, longer than the model's context"
        fix = f"eval and compare shorten these windows to {longest} tokens. Set evaluation.seqlen to {longest} or less."
        yield Finding("windows", "WARN", state, fix)


def _text(corpus: str, purpose: Purpose) -> Finding:
    """Check whether a text can be read: that the hub describes it, or that its first document can be read here."""
    from pgprune_cli.data.corpora import documents

    if on_hub := _text_on_hub(corpus, purpose):
        return on_hub
    try:
        if not next(documents(corpus, purpose), ""):
            raise UserError(f"{corpus}: it contains no text.")
    except UserError as error:
        return finding("text", f"{corpus}, for {purpose}", str(error))
    return finding("text", f"{corpus}, for {purpose}, on this machine")


def _text_on_hub(corpus: str, purpose: Purpose = "calibration") -> Finding | None:
    """Return the finding about a data set that the hub describes, or None if there is no answer.

    Without an answer the text is read as a search would read it: it may be cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from pgprune_cli.data.corpora import hub_corpus, is_local

    if HF_HUB_OFFLINE or is_local(corpus):
        return None
    try:
        HfApi().dataset_info(hub_corpus(corpus).path, timeout=HUB_TIMEOUT)
    except Exception:  # an impossible name, or one of the dozens of types with which the network fails
        return None
    return finding("text", f"{corpus}, for {purpose}, on the hub")
