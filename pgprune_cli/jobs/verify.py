"""verify: check that files are as pgprune wrote them: scores, checkpoints, decisions, runs and exported models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export import checksums, gguf_checksum
from pgprune_cli.jobs.verify_recovery import (
    check_cache,
    check_recovery,
    check_training_checkpoint,
    is_cache,
    is_training_checkpoint,
    parts_of_recovery,
)
from pgprune_cli.model.source import find_recorded
from pgprune_cli.model.tokenizer_files import faults_of_tokenizer
from pgprune_cli.recipe.reader import load
from pgprune_cli.recipe.strict_yaml import one_line
from pgprune_cli.run.checkpoint import load_checkpoint
from pgprune_cli.run.decision import Decision, refuse_other_base
from pgprune_cli.run.layout import (
    CHECKPOINT_RECORD,
    CHECKPOINT_TENSORS,
    CHECKPOINTS_FOLDER,
    COMPARISON_RECORD,
    COSTS_FILE,
    DECISION_MASKS,
    DECISION_RECORD,
    EVALUATION_FILE,
    MEASURED_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    REPAIR_FILE,
    SCORES_FILE,
    checkpoint_folders,
    is_recovery_run,
)
from pgprune_cli.run.resume import refuse_other_decision
from pgprune_cli.run.scores import Scores
from pgprune_cli.search.costs import is_cost_list
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import read_record
from pgprune_cli.storage.rows import refuse_other_rows

BLOCKS = ("attention", "ffn")

Check = Callable[[Path], Iterable[str]]
"""Return or yield the faults of what is at a path. May raise UserError, whose message is then the last fault."""


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`.

    path: what was checked; kind: what it is; checked: the files and folders that were checked in it; faults: one line
    for each.
    """

    path: str
    kind: str
    checked: Sequence[str]
    faults: Sequence[str]

    def text(self) -> str:
        """Return the verdict as `pgprune verify` prints it."""
        intact = f"{self.path}: intact ({self.kind})"
        return "\n".join(self.faults) or (f"{intact}: {', '.join(self.checked)}" if self.checked else intact)


@dataclass(frozen=True)
class Kind:
    """Something that can be verified: what to call it, whether a path is one, its parts, and the check for faults."""

    name: str
    matches: Callable[[Path], bool]
    check: Check
    parts: Callable[[Path], list[str]] = lambda path: []


def verify(path: Path) -> Verdict:
    """Check every byte of `path`. Raises UserError if pgprune did not write it."""
    path = expanded(path)
    if path.name in (CHECKPOINT_RECORD, CHECKPOINT_TENSORS):
        path = path.parent
    if path.name in ("", ".."):  # "." has no name, and a checkpoint is known by its own
        path = path.resolve()
    for kind in KINDS:
        if kind.matches(path):
            return Verdict(str(path), kind.name, kind.parts(path), list(_faults(kind.check, path)))
    raise UserError(
        f"{path}: pgprune did not write this. Give a run directory, a comparison, an exported model, cached "
        "predictions, or one scores, checkpoint or decision file."
    )


def _faults(check: Check, path: Path) -> Iterator[str]:
    """Yield what a check finds, and then the error that stops it. Each fault is one line, whatever names it holds."""
    try:
        yield from map(one_line, check(path))
    except UserError as error:
        yield from map(one_line, str(error).splitlines())


# --- the parts of a run: each check gets the run directory


def _check_recipe(run: Path) -> Iterable[str]:
    load(run / RECIPE_FILE)
    return []


def _check_scores(run: Path) -> Iterator[str]:
    tensors = Scores.load(run).tensors
    expected_names = {f"layers.{index}.{block}" for index in range(len(tensors) // 2) for block in BLOCKS}
    if expected_names != set(tensors) or any(scores.dim() != 1 for scores in tensors.values()):
        yield f"{run / SCORES_FILE}: expected one vector of scores for the attention and the ffn of every layer."
    for name in _non_finite(tensors.items()):
        yield f"{run / SCORES_FILE}: {name} contains NaN or infinity."


def _check_checkpoints(run: Path) -> Iterator[str]:
    folders = checkpoint_folders(run)
    for index, folder in enumerate(folders):
        yield from _faults(partial(_check_checkpoint, older=folders[:index], run=run), folder)


def _check_checkpoint(folder: Path, older: Sequence[Path] = (), run: Path | None = None) -> Iterator[str]:
    """Check a checkpoint, and its history if the run is given. `older` are the checkpoints to fall back to."""
    checkpoint = load_checkpoint(folder, older)
    state = {name: value for name, value in vars(checkpoint.state).items() if isinstance(value, Tensor)}
    for name in _non_finite(state.items()):
        yield f"{folder}: {name} contains NaN or infinity."
    if run:
        refuse_other_rows(run / METRICS_FILE, checkpoint.history)


def _check_metrics(run: Path) -> Iterator[str]:
    lines = (run / METRICS_FILE).read_bytes().split(b"\n")[:-1]  # a killed search may leave an incomplete last line
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            yield f"{run / METRICS_FILE}:{number}: expected a JSON object with the key 'step'."


def _check_costs(run: Path) -> Iterator[str]:
    record = read_record(run / COSTS_FILE)
    for block in BLOCKS:
        if not is_cost_list(record.get(block)):
            yield f"{run / COSTS_FILE}: {block} is not a list of costs (nanoseconds, three integers per layer)."


def _check_decision(run: Path) -> Iterator[str]:
    decision = Decision.load(run)
    if (run / RECIPE_FILE).exists() and not list(_faults(_check_recipe, run)):
        yield from _faults(partial(_check_belongs, decision=decision), run)
        yield from _faults(partial(_check_base, decision=decision), run)
    yield from _check_repair(run, decision)
    if (run / SCORES_FILE).exists() and not list(_faults(_check_scores, run)):
        scores = Scores.load(run)
        decided = {
            f"layers.{index}.{block}": len(layer_mask.of(block))
            for index, layer_mask in enumerate(decision.model_mask)
            for block in BLOCKS
        }
        scored = {name: len(values) for name, values in scores.tensors.items()}
        if scores.fingerprint != decision.fingerprint or scored != decided:
            yield f"{run}: {SCORES_FILE} and {DECISION_RECORD} belong to different models."


def _check_belongs(run: Path, decision: Decision) -> Iterable[str]:
    refuse_other_decision(run, decision)
    return []


def _check_base(run: Path, decision: Decision) -> Iterable[str]:
    """Check that the base model has not changed since the search, if it is on this machine."""
    if (source := find_recorded(decision.model)) is not None:
        refuse_other_base(source, decision, run / DECISION_RECORD)
    return []


def _check_repair(run: Path, decision: Decision) -> Iterator[str]:
    """Check that the refitted weights are finite, and that the output projections fit the kept units."""
    for (index, block), repaired in decision.repaired.items():
        place = f"{run / REPAIR_FILE}: layers.{index}.{block}"
        kept = int(decision.model_mask[index].of(block).sum()) if index < len(decision.model_mask) else 0
        if not kept or not _fits(repaired.weight, kept):
            yield f"{place} does not fit the {kept} kept units."
        parts = {"weight": repaired.weight, "bias": repaired.bias, **repaired.inner}
        tensors = ((f"{index}.{block}.{name}", part) for name, part in parts.items() if part is not None)
        for name in _non_finite(tensors):
            yield f"{run / REPAIR_FILE}: layers.{name} contains NaN or infinity."


def _fits(weight: Tensor, kept: int) -> bool:
    """Return whether an output projection has columns for `kept` elements: a matrix, or one for each kept expert."""
    if weight.dim() == 3:
        return any(len(weight) * channels == kept for channels in weight.shape[1:])
    return weight.dim() == 2 and weight.shape[1] % kept == 0


def _check_record(name: str) -> Check:
    """Return a check that a record in a directory can be read and has the right checksum."""

    def check(directory: Path) -> Iterable[str]:
        read_record(directory / name)
        return []

    return check


def _non_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield the names of the tensors that contain NaN or infinity."""
    return (name for name, values in tensors if not values.isfinite().all())


RUN_PARTS: dict[str, Check] = {
    RECIPE_FILE: _check_recipe,
    SCORES_FILE: _check_scores,
    CHECKPOINTS_FOLDER: _check_checkpoints,
    METRICS_FILE: _check_metrics,
    COSTS_FILE: _check_costs,
    DECISION_RECORD: _check_decision,
    EVALUATION_FILE: _check_record(EVALUATION_FILE),
    MEASURED_FILE: _check_record(MEASURED_FILE),
}
"""What a run directory may contain. An unfinished run has only some of it."""

SINGLE_PARTS = (SCORES_FILE, METRICS_FILE, COSTS_FILE, EVALUATION_FILE, MEASURED_FILE)
"""The parts that can be verified alone, under one name."""


# --- the kinds


def _parts_of_run(run: Path) -> list[str]:
    return [part for part in RUN_PARTS if (run / part).exists()]


def _check_run(run: Path) -> Iterator[str]:
    for part in _parts_of_run(run):
        yield from _faults(RUN_PARTS[part], run)


def _runs_in(comparison: Path) -> list[Path]:
    files = (RECIPE_FILE, SCORES_FILE, MEASURED_FILE)
    return sorted({path.parent for file in files for path in comparison.rglob(file)})


def _parts_of_comparison(directory: Path) -> list[str]:
    return [COMPARISON_RECORD, *(run.relative_to(directory).as_posix() for run in _runs_in(directory))]


def _check_comparison(directory: Path) -> Iterator[str]:
    yield from _faults(_check_record(COMPARISON_RECORD), directory)
    for run in _runs_in(directory):
        yield from _check_run(run)


def _is_gguf(path: Path) -> bool:
    return path.is_file() and gguf_checksum.has_checksum(path)


def _check_gguf(path: Path) -> Iterable[str]:
    fault = gguf_checksum.fault_of(path)
    return [fault] if fault else []


def _is_model_directory(path: Path) -> bool:
    """Return whether this is an export. An export without SHA256SUMS is recognized by its decision and its config."""
    has_decision = all((path / name).exists() for name in ("config.json", DECISION_RECORD))
    return (path / checksums.CHECKSUMS_FILE).exists() or has_decision


def _check_model_directory(path: Path) -> Iterable[str]:
    """Check the files and, if they are undamaged, that this transformers reads the tokenizer with the same ids."""
    return list(checksums.faults_of(path)) or faults_of_tokenizer(path)


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).exists() for name in (CHECKPOINT_RECORD, CHECKPOINT_TENSORS))


KINDS = (
    Kind("GGUF file", _is_gguf, _check_gguf),
    Kind("model directory", _is_model_directory, _check_model_directory),
    Kind(
        "decision",
        lambda path: path.name in (DECISION_RECORD, DECISION_MASKS, REPAIR_FILE),
        lambda path: _check_decision(path.parent),
    ),
    Kind(
        "part of a run",
        lambda path: path.name in SINGLE_PARTS and path.is_file(),
        lambda path: RUN_PARTS[path.name](path.parent),
    ),
    Kind(
        "table of a comparison",
        lambda path: path.name == COMPARISON_RECORD,
        lambda path: _check_record(COMPARISON_RECORD)(path.parent),
    ),
    Kind("checkpoint of a recovery", is_training_checkpoint, check_training_checkpoint),
    Kind("checkpoint", _is_checkpoint, _check_checkpoint),
    Kind("cached predictions", is_cache, check_cache),
    Kind("recovery directory", is_recovery_run, check_recovery, parts_of_recovery),
    Kind("run directory", lambda path: bool(_parts_of_run(path)), _check_run, _parts_of_run),
    Kind("comparison", lambda path: (path / COMPARISON_RECORD).exists(), _check_comparison, _parts_of_comparison),
)
"""What can be verified. The first kind that matches is taken."""
