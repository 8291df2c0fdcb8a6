"""What a report says, read from run directories: finished ones, and ones that are still searching."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.errors import UserError
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.evaluation import read_measured
from pgprune_cli.run.history import Row, read_history
from pgprune_cli.run.layout import DECISION_RECORD, RECIPE_FILE
from pgprune_cli.run.provenance import read_provenance
from pgprune_cli.run.scores import Scores

BLOCKS = 48
"""Cells of a heat map's row, at most: a layer's FFN channels come in runs of equal length."""

UNIT = {"attention": "KV head", "ffn": "FFN channel"}
"""What a unit of a family is called; every other family has one unit a layer."""


@dataclass(frozen=True)
class Run:
    """A run directory, read.

    recipe: as it stands in the file, whichever version of pgprune wrote it; units: how many the dense model has in
    every layer, by family of the recipe; state: of the last checkpoint; decision: without its repair.
    """

    name: str
    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    rows: list[Row]
    units: dict[str, list[int]]
    state: SearchState | WidthState | None
    decision: Decision | None
    measured: dict[str, Any] | None
    provenance: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Of the whole search."""
        return int(self.recipe["search"]["forward_passes"]) // int(self.recipe["search"]["masks_per_step"])

    @property
    def progress(self) -> str:
        if self.decision is not None:
            return "finished"
        done = self.rows[-1].step if self.rows else 0
        return f"step {done} of {self.steps}"

    @property
    def forward_passes(self) -> list[int]:
        """Forward passes of the search up to every row, its own included."""
        return list(accumulate(len(row.losses) for row in self.rows))

    @property
    def widths(self) -> dict[str, list[int]] | None:
        """Units that every layer keeps, by family: as decided, or as last judged while it searches."""
        if self.decision is not None:
            blocks = {name: [int(layer.of(name).sum()) for layer in self.decision.model_mask] for name in UNIT}
            return {name: widths for name, widths in blocks.items() if _touched(name, self.units)}
        judged = [row.kept for row in self.rows if row.kept is not None]
        return judged[-1] if judged else None

    def dense(self, family: str) -> list[int]:
        """Units of every layer before pruning: of `attention` and `ffn` also where they go as a whole."""
        if family in self.units:
            return self.units[family]
        assert self.decision is not None, "only a decision speaks of units that the search does not"
        return [len(layer.of(family)) for layer in self.decision.model_mask]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs, each under the part of its path that tells it from the others. Raises UserError as `read_run` does."""
    paths = list(dict.fromkeys(directory.resolve() for directory in directories))
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """`x/flap/seed-0` and `x/obs/seed-0` are `flap` and `obs`."""
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(shared).parts for path in paths]
    while min(map(len, names)) > 1 and len({name[-1] for name in names}) == 1:
        names = [name[:-1] for name in names]
    return ["/".join(name) for name in names]


def read_run(directory: Path, name: str) -> Run:
    """Raises UserError for what is no run directory, for one before its scores, and for damage."""
    path = directory / RECIPE_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no run of a search here, it has no {RECIPE_FILE}; `pgprune search` makes one")
    text = path.read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    decision = Decision.load(directory, with_repair=False) if (directory / DECISION_RECORD).exists() else None
    checkpoint = latest_checkpoint(directory)
    return Run(
        name=name,
        directory=directory,
        recipe=recipe,
        recipe_text=text,
        rows=read_history(directory),
        units=_units(directory, recipe["units"]["families"]),
        state=None if checkpoint is None else checkpoint.state,
        decision=decision,
        measured=read_measured(directory),
        provenance=read_provenance(directory),
    )


def _units(directory: Path, families: Sequence[str]) -> dict[str, list[int]]:
    scores = Scores.load(directory).tensors
    layers = 1 + max(int(name.split(".")[1]) for name in scores)
    return {
        family: [len(scores[f"layers.{i}.{family}"]) if family in UNIT else 1 for i in range(layers)]
        for family in families
    }


def _touched(block: str, families: dict[str, list[int]]) -> bool:
    """Whether a search over these families can take anything of a block."""
    return any(family == "layer" or family.removesuffix("-block") == block for family in families)


def theta_cells(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Keep probabilities of the last checkpoint, by family; nothing where the search has none."""
    if not isinstance(run.state, SearchState):
        return {}
    cells, start = {}, 0
    for family, counts in run.units.items():
        layers = run.state.theta[start : start + sum(counts)].split(counts)
        cells[family] = list(_cells(family, layers))
        start += sum(counts)
    return cells


def kept_cells(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Which units stay, by block: the fraction kept of each run of units. Nothing before there is a decision."""
    if run.decision is None:
        return {}
    keep = run.decision.model_mask
    return {
        block: list(_cells(block, [layer.of(block).double() for layer in keep]))
        for block in UNIT
        if _touched(block, run.units)
    }


def _cells(family: str, layers: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
    """One for each run of units: `first` and the mean `value` over it; `units` says which they are."""
    length = -(-max(len(values) for values in layers) // BLOCKS)
    unit = UNIT.get(family, "the whole layer")
    for layer, values in enumerate(layers):
        for number, part in enumerate(values.split(length)):
            first = number * length
            last = first + len(part) - 1
            which = unit if family not in UNIT else f"{unit} {first}" if first == last else f"{unit}s {first}–{last}"
            yield {"layer": layer, "first": first, "units": which, "value": round(float(part.mean()), 4)}


def sensitivities(run: Run) -> list[dict[str, Any]]:
    """How much loss an error of every layer and family costs, relative to the others, as the layers policy learned it.

    `low` and `high` are one standard deviation of the search's next samples away.
    """
    if not isinstance(run.state, WidthState):
        return []
    pairs = [(family, layer) for family, counts in run.units.items() for layer in range(len(counts))]
    low, high = run.state.mean - run.state.spread, run.state.mean + run.state.spread
    values = zip(run.state.mean.exp().tolist(), low.exp().tolist(), high.exp().tolist(), strict=True)
    return [
        {"family": family, "layer": layer, "value": value, "low": least, "high": most}
        for (family, layer), (value, least, most) in zip(pairs, values, strict=True)
    ]
