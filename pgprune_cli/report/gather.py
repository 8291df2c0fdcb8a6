"""Read what a report shows from run directories, finished or still searching."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from pgprune_cli.console.commands import command_line
from pgprune_cli.core.families import BLOCKS_OF, WHOLE_FAMILIES
from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.strict_yaml import read_text
from pgprune_cli.report.recoveries import Recovery, read_recovery
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.evaluation import read_measured
from pgprune_cli.run.history import Row, read_history
from pgprune_cli.run.layout import DECISION_RECORD, RECIPE_FILE, is_recovery_run, refuse_no_run
from pgprune_cli.run.provenance import required_provenance
from pgprune_cli.run.scores import Scores

MAX_CELLS = 48
"""Cells in a row of a heat map. A layer with more units shows runs of neighbouring units, all of the same length."""

ELEMENT = {"attention": "query head", "ffn": "FFN channel"}
"""What an element of a block is called. Every other family has one unit per layer."""

GROUP = {"attention": "KV head"}
"""What a unit of a unit search is called where it is a group of several elements."""


@dataclass(frozen=True)
class Run:
    """The content of a run directory.

    elements: how many query heads or channels every layer of the dense model has, by family of the recipe; for a family
    that removes whole blocks 1, or 0 where the layer has no such block; units: how many units a unit search has;
    state: of the last checkpoint; decision: without its repair.
    """

    name: str
    directory: Path
    recipe: Recipe
    recipe_text: str
    rows: list[Row]
    elements: dict[str, list[int]]
    units: dict[str, list[int]]
    state: SearchState | WidthState | None
    decision: Decision | None
    measured: dict[str, Any] | None
    provenance: list[dict[str, Any]]

    @property
    def is_finished(self) -> bool:
        """Whether the search is finished."""
        return self.decision is not None

    @property
    def steps(self) -> int:
        """Return the steps of the whole search."""
        return self.recipe.search.steps

    @property
    def progress(self) -> str:
        """Return how far the run has come, in words."""
        if self.decision is not None:
            return "finished"
        done = self.rows[-1].step if self.rows else 0
        return f"step {done} of {self.steps}"

    @property
    def bos(self) -> bool:
        """Whether the windows of the calibration text begin with the BOS token. False before the first step."""
        return self.decision.bos if self.decision is not None else any(row.bos for row in self.rows)

    @property
    def repeat_command(self) -> str:
        """Return the command that repeats the search from the resolved recipe."""
        return command_line("pgprune", "search", self.directory / RECIPE_FILE, "--out", f"{self.directory}-again")

    @property
    def forward_passes(self) -> list[int]:
        """Return, for every step, the forward passes of the search up to and including it."""
        return list(accumulate(len(row.losses) for row in self.rows))

    @property
    def widths(self) -> dict[str, list[int]] | None:
        """Return how many elements every layer keeps, by family: as decided, or as the search last evaluated."""
        if self.decision is not None:
            blocks = {name: [int(layer.of(name).sum()) for layer in self.decision.model_mask] for name in ELEMENT}
            return {name: widths for name, widths in blocks.items() if _can_remove_from(name, self.elements)}
        evaluated = [row.kept for row in self.rows if row.kept is not None]
        return evaluated[-1] if evaluated else None

    def dense(self, family: str) -> list[int]:
        """Return how many elements every layer has before pruning, also for a block that is removed as a whole."""
        if family in self.elements:
            return self.elements[family]
        assert self.decision is not None, "only a decision has masks for blocks that the search removes as a whole"
        return [len(layer.of(family)) for layer in self.decision.model_mask]


def read_runs(directories: Sequence[Path]) -> list[Run | Recovery]:
    """Read runs, each named by the part of its path in which they differ. Raises UserError as `read_run` does."""
    for directory in directories:
        refuse_no_run(directory)
    paths = list(dict.fromkeys(directory.resolve() for directory in directories))
    return [
        read_recovery(path, name) if is_recovery_run(path) else read_run(path, name)
        for path, name in zip(paths, _names(paths), strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the part of each path that differs: `x/flap/seed-0` and `x/obs/seed-0` give `flap` and `obs`."""
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(shared).parts for path in paths]
    while min(map(len, names)) > 1 and len({name[-1] for name in names}) == 1:
        names = [name[:-1] for name in names]
    return ["/".join(name) for name in names]


def read_run(directory: Path, name: str) -> Run:
    """Read a run directory. Raises UserError if it is not one, has no scores yet, or is damaged."""
    path = directory / RECIPE_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file, so no search was started here. Start one: pgprune search RECIPE")
    recipe = load(path)
    decision = Decision.load(directory, with_repair=False) if (directory / DECISION_RECORD).exists() else None
    scores, families = Scores.load(directory), recipe.units.families
    elements: dict[str, list[int]] = {name: _elements(scores, name) for name in families}
    return Run(
        name=name,
        directory=directory,
        recipe=recipe,
        recipe_text=read_text(path),
        rows=read_history(directory),
        elements=elements,
        units={name: scores.units.get(name, elements[name]) for name in families},
        state=_state(directory, finished=decision is not None),
        decision=decision,
        measured=read_measured(directory),
        provenance=required_provenance(directory),
    )


def _state(directory: Path, finished: bool) -> SearchState | WidthState | None:
    """Return the state of the last checkpoint, None without one. Raises UserError if it is damaged.

    Once a search is finished it needs no checkpoint, so a damaged one only costs the report two kinds of figures.
    """
    try:
        checkpoint = latest_checkpoint(directory)
    except UserError:
        if not finished:
            raise
        return None
    return None if checkpoint is None else checkpoint.state


def _elements(scores: Scores, family: str) -> list[int]:
    """Return how many elements every layer has, for a family that removes whole blocks 1 where there is any."""
    layers = range(len(scores.units["attention"]))
    counts = [sum(len(scores.tensors[f"layers.{layer}.{block}"]) for block in BLOCKS_OF[family]) for layer in layers]
    return [min(count, 1) for count in counts] if family in WHOLE_FAMILIES else counts


def _can_remove_from(block: str, families: dict[str, list[int]]) -> bool:
    """Return whether a search over these families can remove units from a block."""
    return any(family == "layer" or family.removesuffix("-block") == block for family in families)


def theta_cells(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the keep probabilities of the last checkpoint, by family. Only a unit search has them."""
    if not isinstance(run.state, SearchState):
        return {}
    cells, start = {}, 0
    for family, counts in run.units.items():
        layers = run.state.theta[start : start + sum(counts)].split(counts)
        cells[family] = list(_cells(unit_name(run, family), layers))
        start += sum(counts)
    return cells


def kept_cells(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the kept fraction of each run of units, by block. Empty as long as there is no decision."""
    if run.decision is None:
        return {}
    return {
        block: list(_cells(ELEMENT[block], [layer_mask.of(block).double() for layer_mask in run.decision.model_mask]))
        for block in ELEMENT
        if _can_remove_from(block, run.elements)
    }


def unit_name(run: Run, family: str) -> str:
    """Return what a unit of a unit search is called: a KV head takes its query heads along. "" for a whole layer."""
    if family in GROUP and run.units[family] != run.elements[family]:
        return GROUP[family]
    return ELEMENT.get(family, "")


def _cells(unit: str, layers: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
    """Yield a cell for each run of units: the `first` unit, the mean `value`, and a label of the `units`.

    A layer that lacks the block, because it was lost in an earlier pruning, has one cell of the value 0.
    """
    length = -(-max(len(values) for values in layers) // MAX_CELLS)
    for layer, values in enumerate(layers):
        if not len(values):
            yield {"layer": layer, "first": 0, "units": "none in this layer", "value": 0.0}
            continue
        for number, part in enumerate(values.split(length)):
            first = number * length
            last = first + len(part) - 1
            label = f"{unit} {first}" if first == last else f"{unit}s {first}–{last}"
            label = label if unit else "the whole layer"
            yield {"layer": layer, "first": first, "units": label, "value": round(float(part.mean()), 4)}


def sensitivities(run: Run) -> list[dict[str, Any]]:
    """Return how much an error in each layer and family raises the loss, relative to the others, as a width search
    learned it.

    `low` and `high` are one standard deviation of the next sampled masks away.
    """
    if not isinstance(run.state, WidthState):
        return []
    pairs = [(family, layer) for family, counts in run.units.items() for layer in range(len(counts))]
    mean, spread = run.state.mean, run.state.spread
    values = zip(*(logarithms.exp().tolist() for logarithms in (mean, mean - spread, mean + spread)), strict=True)
    return [
        {"family": family, "layer": layer, "value": value, "low": low, "high": high}
        for (family, layer), (value, low, high) in zip(pairs, values, strict=True)
    ]
