"""verify: whether what pgprune wrote is as it was written: scores, checkpoints, decisions, runs, exported models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export import checksums as checksums
from pgprune_cli.export import gguf_checksum as gguf_checksum
from pgprune_cli.recipe.reader import load
from pgprune_cli.recipe.strict_yaml import one_line
from pgprune_cli.run import checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.history import refuse_other_history
from pgprune_cli.run.layout import (
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
)
from pgprune_cli.run.resume import refuse_other_decision
from pgprune_cli.run.scores import Scores
from pgprune_cli.storage.records import read_record

Faults = Iterator[str]


@dataclass(frozen=True)
class Verdict:
    """path: what was looked at; kind: what it is; checked: the files and folders of it; faults: a line each."""

    path: str
    kind: str
    checked: Sequence[str]
    faults: Sequence[str]

    def text(self) -> str:
        """As the verb prints it."""
        whole = f"{self.path}: whole, a {self.kind}"
        return "\n".join(self.faults) or (f"{whole}: {', '.join(self.checked)}" if self.checked else whole)


def verify(path: Path) -> Verdict:
    """Looks at every byte of `path`. Raises UserError for what pgprune did not write."""
    path = path.expanduser()
    path = path.parent if path.name in (checkpoint.DECISION_RECORD, checkpoint.TENSORS) else path
    for kind, is_one, faults in KINDS:
        if is_one(path):
            return Verdict(str(path), kind, [], list(_lines(faults(path))))
    if any((path / part).exists() for part in RUN):
        return _run(path)
    if (path / COMPARISON_RECORD).exists():
        return _comparison(path)
    raise UserError(
        f"{path}: not of pgprune, which writes {SCORES_FILE}, {DECISION_RECORD}, checkpoints, run directories and exported models"
    )


def _lines(faults: Faults) -> Faults:
    """These, and after them the one that they stop at; a line each, whatever the names in it hold."""
    try:
        yield from map(one_line, faults)
    except UserError as error:
        yield from map(one_line, str(error).splitlines())


# --- the parts of a run, by the run directory


def _recipe(run: Path) -> Faults:
    load(run / RECIPE_FILE)
    yield from ()


def _scores(run: Path) -> Faults:
    tensors = Scores.load(run).tensors
    layers = len(tensors) // 2
    wanted = {f"layers.{index}.{block}" for index in range(layers) for block in ("attention", "ffn")}
    if wanted != set(tensors) or any(values.dim() != 1 for values in tensors.values()):
        yield f"{run / SCORES_FILE}: not one list of scores for the attention and the ffn of every layer"
    yield from (f"{run / SCORES_FILE}: {name} holds NaN or infinity" for name in _not_finite(tensors.items()))


def _checkpoints(run: Path) -> Faults:
    folders = sorted((run / CHECKPOINTS_FOLDER).glob("step-*"))
    for index, folder in enumerate(folders):
        yield from _lines(_checkpoint(folder, folders[:index], run))


def _checkpoint(folder: Path, older: Sequence[Path] = (), run: Path | None = None) -> Faults:
    found = checkpoint.load_checkpoint(folder, older)
    tensors = {name: value for name, value in vars(found.state).items() if isinstance(value, Tensor)}
    yield from (f"{folder}: {name} holds NaN or infinity" for name in _not_finite(tensors.items()))
    if run:
        refuse_other_history(run, found.history)


def _metrics(run: Path) -> Faults:
    lines = (run / METRICS_FILE).read_bytes().split(b"\n")[:-1]  # what a killed search wrote of a line is no damage
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            yield f"{run / METRICS_FILE}:{number}: not a row of a search"


def _costs(run: Path) -> Faults:
    record = read_record(run / COSTS_FILE)
    for family in ("attention", "ffn"):
        values = record.get(family)
        if not isinstance(values, list) or not values or not all(type(value) is int and value > 0 for value in values):
            yield f"{run / COSTS_FILE}: {family} is no list of nanoseconds a unit"


def _decision(run: Path) -> Faults:
    decision = Decision.load(run)
    yield from _lines(_of_this_run(run, decision))
    for (index, block), output in decision.outputs.items():
        kept = int(decision.model_mask[index].of(block).sum()) if index < len(decision.model_mask) else 0
        if output.weight.dim() != 2 or not kept or output.weight.shape[1] % kept:
            yield f"{run / REPAIR_FILE}: layers.{index}.{block} does not fit the {kept} units that stay there"
        elif any(
            _not_finite((part, value) for part, value in zip(("w", "b"), output, strict=True) if value is not None)
        ):
            yield f"{run / REPAIR_FILE}: layers.{index}.{block} holds NaN or infinity"
    if (run / SCORES_FILE).exists() and not list(_lines(_scores(run))):
        scores = Scores.load(run)
        sizes = [len(values) for layer in decision.model_mask for values in (layer.attention, layer.ffn)]
        scored = [len(scores.tensors[f"layers.{i // 2}.{('attention', 'ffn')[i % 2]}"]) for i in range(len(sizes))]
        if scores.fingerprint != decision.fingerprint or sizes != scored:
            yield f"{run}: {SCORES_FILE} and {DECISION_RECORD} are of two models"


def _of_this_run(run: Path, decision: Decision) -> Faults:
    if (run / RECIPE_FILE).exists() and not list(_lines(_recipe(run))):
        refuse_other_decision(run, decision)
    yield from ()


def _object(name: str) -> Callable[[Path], Faults]:
    def faults(run: Path) -> Faults:
        read_record(run / name)
        yield from ()

    return faults


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    return (name for name, values in tensors if not values.isfinite().all())


RUN: dict[str, Callable[[Path], Faults]] = {
    RECIPE_FILE: _recipe,
    SCORES_FILE: _scores,
    CHECKPOINTS_FOLDER: _checkpoints,
    METRICS_FILE: _metrics,
    COSTS_FILE: _costs,
    DECISION_RECORD: _decision,
    EVALUATION_FILE: _object(EVALUATION_FILE),
    MEASURED_FILE: _object(MEASURED_FILE),
}
"""What a run directory may hold; a run that is not finished lacks some."""


def _run(run: Path) -> Verdict:
    checked = [part for part in RUN if (run / part).exists()]
    return Verdict(str(run), "run directory", checked, [line for part in checked for line in _lines(RUN[part](run))])


def _comparison(out: Path) -> Verdict:
    """A directory of `pgprune compare`: its table, and every run below it."""
    runs = sorted({path.parent for part in (RECIPE_FILE, SCORES_FILE, MEASURED_FILE) for path in out.rglob(part)})
    faults = [*_lines(_object(COMPARISON_RECORD)(out)), *(line for run in runs for line in _run(run).faults)]
    return Verdict(
        str(out), "comparison", [COMPARISON_RECORD, *(run.relative_to(out).as_posix() for run in runs)], faults
    )


# --- what can be looked at by itself: kind, whether a path is one, its faults

PARTS = (SCORES_FILE, METRICS_FILE, COSTS_FILE, EVALUATION_FILE, MEASURED_FILE)


def _gguf(path: Path) -> Faults:
    fault = gguf_checksum.fault_of(path)
    yield from [fault] if fault else []


def _exported(path: Path) -> bool:
    return (path / checksums.CHECKSUMS_FILE).exists() or all(
        (path / name).exists() for name in ("config.json", DECISION_RECORD)
    )


KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Faults]], ...] = (
    ("model in a GGUF file", lambda path: path.is_file() and gguf_checksum.has_checksum(path), _gguf),
    ("model directory", _exported, checksums.faults_of),
    (
        "decision",
        lambda path: path.name in (DECISION_RECORD, DECISION_MASKS, REPAIR_FILE),
        lambda path: _decision(path.parent),
    ),
    ("part of a run", lambda path: path.name in PARTS and path.is_file(), lambda path: RUN[path.name](path.parent)),
    (
        "comparison's table",
        lambda path: path.name == COMPARISON_RECORD,
        lambda path: _object(COMPARISON_RECORD)(path.parent),
    ),
    (
        "checkpoint",
        lambda path: any((path / name).exists() for name in (checkpoint.DECISION_RECORD, checkpoint.TENSORS)),
        _checkpoint,
    ),
)
