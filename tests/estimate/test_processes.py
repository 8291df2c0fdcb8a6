"""What each of several processes does: FLOPs against those that torch counts on simulated ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.contexts import context_of
from helpers.fits import always_find_something_better
from helpers.flops import counted
from helpers.masks import keep_first
from helpers.medium import medium_model, medium_recipe, random_batches
from helpers.processes import run_together
from helpers.units import ranks_of
from torch import nn

from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.distributed import Ranks
from pgprune_cli.estimate import phases as module
from pgprune_cli.estimate.passes import OwnText, Setup
from pgprune_cli.estimate.phases import phases
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.forward import short_attention
from pgprune_cli.forward.curvature import ErrorRoots, error_roots
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair import training
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.repair.width_table import solve_layers
from pgprune_cli.scores.metrics import score
from pgprune_cli.search.budget import estimated_units
from pgprune_cli.search.objective import Objective

pytestmark = pytest.mark.usefixtures("kernel_for_groups")

TEXT = random_batches(windows=8, length=16, batches=4)
FITTED = random_batches(windows=32, length=16, batches=4)
LAYERS, HALF = 5, (1, 96)
STEPS, MASKS = 5, 10
RECIPE = medium_recipe(
    "search.objective=kl", f"search.forward_passes={STEPS * MASKS}", f"search.masks_per_step={MASKS}", "repair.epochs=1"
)


def scores(model: PrunableModel, ranks: Ranks, _: ErrorRoots) -> None:
    score(model, "obs", TEXT, 0, ranks.share(model.shape.layers), ranks=ranks)


def width_table(model: PrunableModel, ranks: Ranks, _: ErrorRoots) -> None:
    units = estimated_units(RECIPE, model.shape)
    roots, own = error_roots(model, TEXT, ranks=ranks), ranks.share(model.shape.layers)
    order = ranks_of(model.shape, units)
    dict(solve_layers(model, order, units, TEXT, 1e-3, solve=True, only=own, roots=roots, ranks=ranks))


def steps(model: PrunableModel, ranks: Ranks, _: ErrorRoots) -> None:
    text = CalibrationText(torch.cat(TEXT), TEXT[0], torch.cat(TEXT).flatten())
    recipe = replace(RECIPE, calibration=replace(RECIPE.calibration, batch=8))
    context = replace(context_of(recipe, model, Path(), text), ranks=ranks)
    own = [keep_first(model.module, [HALF] * LAYERS)] * len(ranks.share(MASKS))
    objective = Objective(context)
    for position in range(STEPS):
        objective.values(own, position, [{}] * len(own))


def whole_repair(model: PrunableModel, ranks: Ranks, roots: ErrorRoots) -> None:
    mask = keep_first(model.module, [HALF] * LAYERS)
    repair(model, mask, FITTED, "sublayer", 1e-3, epochs=1, last_layers=1, reselect=True, roots=roots, ranks=ranks)


PHASES: dict[str, Callable[[PrunableModel, Ranks, ErrorRoots], None]] = {
    "scores": scores,
    "width table": width_table,
    "steps": steps,
    "repair": whole_repair,
}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return a model whose fits look at all of their text in the end, because they always find something better."""
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr(module, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr(short_attention, "LONGEST", 0)  # no products with keys that are not seen
    always_find_something_better(monkeypatch, 128)
    return medium_model(num_hidden_layers=LAYERS)


CASES = [
    (phase, shards, world)
    for phase in PHASES
    for shards in (1, 2)
    for world in (1, 2, 3)
    if phase != "repair" or (shards, world) in {(1, 2), (2, 1), (2, 3)}  # repairs take long
]


@pytest.mark.parametrize(("phase", "shards", "world"), CASES)
def test_the_busiest_process_does_what_is_said(
    phase: str, shards: int, world: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one shard, as on GPUs, and with two, as on CPUs."""
    monkeypatch.setattr("pgprune_cli.forward.shards.SHARDS", shards)
    sizes, roots = Sizes(PrunableModel.of(model), RECIPE), error_roots(PrunableModel.of(model), TEXT)

    def count(ranks: Ranks) -> int:
        own = PrunableModel.of(copy.deepcopy(model))
        return counted(lambda: PHASES[phase](own, ranks, roots))

    texts = Texts(TEXT, TEXT, FITTED, TEXT[0], TEXT[0][:0])
    parts = phases(sizes, texts, Setup(processes=world, shards=shards))[phase]
    expected = sum(part.flops.total() for part in parts)
    assert expected == pytest.approx(max(run_together(world, count)), rel=0.03)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_process_with_most_text_has_its_share(count: int, shards: int, world: int) -> None:
    own = OwnText.of([TEXT[0]] * count, Setup(processes=world, shards=shards))
    divided_by = min(4 if world > 3 else 2 if world > 1 else 1, 1 << min(shards, count).bit_length() - 1)
    assert len(own.batches) == -(-count // divided_by)
    assert own.is_divided == (divided_by > 1)
    assert own.shards * divided_by == 1 << min(shards, count).bit_length() - 1
