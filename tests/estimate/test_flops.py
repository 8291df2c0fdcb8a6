"""FLOPs against those that torch counts while the parts of a search run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fits import always_find_something_better
from helpers.flops import counted
from helpers.masks import keep_first
from helpers.medium import medium_model, medium_recipe, random_batches
from helpers.units import ranks_of
from torch import Tensor, nn

from pgprune_cli.estimate.flops import Flops, block_fits, forward_passes, head_passes, layer_passes, sampling, seconds
from pgprune_cli.estimate.passes import Setup
from pgprune_cli.estimate.phases import last_layers as last_layers_work
from pgprune_cli.estimate.phases import phases, repair, scores, width_table
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.estimate.work import Work
from pgprune_cli.forward import short_attention
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.divergence import Divergence
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.forward.sampling import sampled_batches
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair import last_layers, least_squares, training
from pgprune_cli.repair.least_squares import repair as run_repair
from pgprune_cli.repair.sublayer import SublayerFit
from pgprune_cli.repair.training import Weights
from pgprune_cli.repair.width_table import solve_layers
from pgprune_cli.scores.metrics import score
from pgprune_cli.search.budget import estimated_units

pytestmark = pytest.mark.usefixtures("kernel_for_groups")

SETUP = Setup()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return medium_model()


def flops_of(works: Sequence[Work]) -> Flops:
    """Return the FLOPs of some parts of a search together."""
    return sum((work.flops for work in works), Flops())


def repaired(sizes: Sizes, text: list[Tensor]) -> Flops:
    return flops_of(repair(sizes, text, SETUP))


def flops_by_phase(recipe: Recipe, model: nn.Module, text: list[Tensor]) -> dict[str, Flops]:
    texts = Texts(text, text, text, text[0], text[1])
    return {
        name: flops_of(works) for name, works in phases(Sizes(PrunableModel.of(model), recipe), texts, SETUP).items()
    }


def half(model: nn.Module) -> ModelMask:
    return keep_first(model, [(1, 96)] * len(model.model.layers))


def solved(model: nn.Module, text: list[Tensor], policy: str, solve: bool) -> object:
    """Solve the width table of a recipe's units."""
    prunable = PrunableModel.of(model)
    units = estimated_units(medium_recipe(f"search.policy={policy}"), prunable.shape)
    return dict(solve_layers(prunable, ranks_of(prunable.shape, units), units, text, 1e-3, solve=solve))


@pytest.mark.parametrize("metric", ["obs", "flap", "wanda-sp", "taylor", "magnitude", "uniform"])
def test_scoring(metric: str, model: nn.Module) -> None:
    text = random_batches()
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"scores.metric={metric}"))
    expected = counted(lambda: score(PrunableModel.of(model), metric, text, 0))
    # The first layer's inputs need no gradient, and weights that are not pruned need none.
    assert flops_of(scores(sizes, text, SETUP)).total() == pytest.approx(
        expected, rel=0.1 if metric == "taylor" else 0.01
    )


@pytest.mark.parametrize("method", ["least-squares", "none"])
def test_the_width_table(method: str, model: nn.Module) -> None:
    text, sizes = random_batches(), Sizes(PrunableModel.of(model), medium_recipe(f"repair.method={method}"))
    solve = method == "least-squares"
    expected = counted(lambda: solved(model, text, "widths", solve))
    assert flops_of(width_table(sizes, text, SETUP)).total() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("policy", ["widths", "units"])
def test_the_repair(policy: str, model: nn.Module) -> None:
    """The roots are those of the width table."""
    recipe = medium_recipe(f"search.policy={policy}", "repair.method=least-squares")
    text, sizes = random_batches(), Sizes(PrunableModel.of(model), recipe)
    prunable, reselect = PrunableModel.of(model), policy == "widths"
    roots = error_roots(prunable, text)
    expected = counted(
        lambda: run_repair(prunable, half(model), text, "least-squares", 1e-3, reselect=reselect, roots=roots)
    )
    assert repaired(sizes, text).total() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("epochs", [1, 4])
def test_the_fit_of_whole_blocks(epochs: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fits are counted. Every look at the text finds something better, so each ends with two at all of it."""
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr(short_attention, "LONGEST", 0)  # no products with keys that are not seen
    always_find_something_better(monkeypatch, 64)
    text, counts = random_batches(windows=32), []
    recipe = medium_recipe(f"repair.epochs={epochs}", "repair.last_layers=0")
    solve = SublayerFit.solve

    def count(fit: SublayerFit, start: Weights) -> Weights:
        solved: list[Weights] = []
        counts.append(counted(lambda: solved.append(solve(fit, start))))
        assert solved[0] is not start
        return solved[0]

    monkeypatch.setattr(SublayerFit, "solve", count)
    run_repair(PrunableModel.of(model), half(model), text, "sublayer", 1e-3, epochs=epochs)
    assert len(counts) == 6
    sizes = Sizes(PrunableModel.of(model), recipe)
    assert block_fits(sizes, text).total() == pytest.approx(sum(counts), rel=0.05)
    closed = Sizes(PrunableModel.of(model), medium_recipe("repair.method=least-squares"))
    assert repaired(sizes, text) == repaired(closed, text) + block_fits(sizes, text)
    assert block_fits(sizes, text[:1])[torch.float32] > 0
    assert block_fits(sizes, [text[0][:1]]).total() == 0  # nothing to set aside


@pytest.mark.parametrize("count", [1, 2])
def test_the_fit_of_the_last_layers(count: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 64)
    text, counts = random_batches(windows=32), []
    fit, states = least_squares.fit_last_layers, last_layers.dense_states

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def counting_run(*arguments: object) -> Any:
            results: list[Any] = []
            counts.append(counted(lambda: results.append(run(*arguments))))
            return results[0]

        return counting_run

    monkeypatch.setattr(least_squares, "fit_last_layers", counting(fit))
    monkeypatch.setattr(last_layers, "dense_states", counting(states))
    run_repair(PrunableModel.of(model), half(model), text, "sublayer", 1e-3, epochs=1, last_layers=count)
    assert len(counts) == 2
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"repair.last_layers={count}"))
    own = last_layers_work(sizes, text, SETUP).flops
    assert own.total() == pytest.approx(sum(counts), rel=0.05)
    outputs = Sizes(PrunableModel.of(model), medium_recipe("repair.last_layers=0"))
    assert repaired(sizes, text) == repaired(outputs, text) + own


@pytest.mark.parametrize("vocabulary", [200, 2000])
def test_the_text_that_the_dense_model_writes(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is a pass of its own, through layers that remember those before it."""
    model, text = medium_model(vocab_size=vocabulary), random_batches(windows=8, length=32)
    shapes = [(len(batch), batch.shape[1]) for batch in text]
    every = torch.ones(vocabulary, dtype=torch.bool)
    expected = counted(lambda: list(sampled_batches(model, 0, every, shapes, 0)))
    sizes = Sizes(PrunableModel.of(model), medium_recipe())
    assert sampling(sizes, text).total() == pytest.approx(expected, rel=0.02)


def test_text_is_written_in_the_phase_of_the_repair(model: nn.Module) -> None:
    text, sizes = random_batches(), Sizes(PrunableModel.of(model), medium_recipe())
    texts = Texts(text, text, text, text[0], text[1])
    without, own = (phases(sizes, given, SETUP) for given in (texts, replace(texts, sampled=text[:1])))
    assert {name for name, works in own.items() if flops_of(works) != flops_of(without[name])} == {"repair"}
    curvature = flops_of(own["repair"]) - flops_of(without["repair"]) - sampling(sizes, text[:1])
    assert curvature.total() > 0
    units = Sizes(PrunableModel.of(model), medium_recipe("search.policy=units"))
    without, own = (phases(units, given, SETUP) for given in (texts, replace(texts, sampled=text[:1])))
    assert flops_of(own["repair"]) == flops_of(without["repair"]) + sampling(units, text[:1])


def test_forwards(model: nn.Module) -> None:
    (text,) = random_batches(batches=1)
    keeps = [half(model)] * 3
    expected = counted(lambda: Evaluator(PrunableModel.of(model)).losses(keeps, text))
    assert forward_passes(Sizes(PrunableModel.of(model), medium_recipe()), text, 3).total() == pytest.approx(
        expected, rel=0.01
    )
    dense = Sizes(PrunableModel.of(model), medium_recipe("budget.sparsity=0"))
    assert forward_passes(dense, text, 1).total() > 1.2 * expected / 3


def test_flops_count_a_family_that_is_not_searched_as_dense(model: nn.Module) -> None:
    (text,) = random_batches(batches=1)
    keep = tuple(replace(layer, attention=torch.ones(8, dtype=torch.bool)) for layer in half(model))
    expected = counted(lambda: Evaluator(PrunableModel.of(model)).losses([keep], text))
    for family in ("ffn", "ffn-block"):
        recipe = medium_recipe(f"units.families=[{family}]", "search.policy=units")
        sizes = Sizes(PrunableModel.of(model), recipe)
        assert forward_passes(sizes, text, 1).total() == pytest.approx(expected, rel=0.01)


def test_the_phases_of_a_search_and_how_often_it_looks_at_the_text_held_out(model: nn.Module) -> None:
    text = random_batches()

    def phase(*overrides: str) -> dict[str, Flops]:
        return flops_by_phase(medium_recipe(*overrides), model, text)

    assert list(phase()) == ["opening", "scores", "width table", "steps", "repair"]
    few = phase("search.policy=units", "repair.method=none", "scores.metric=magnitude")
    assert list(few) == ["opening", "steps", "repair"]
    sizes = Sizes(PrunableModel.of(model), medium_recipe())
    once = forward_passes(sizes, text[1], 1).total()
    layers, head = layer_passes(sizes, text[1:]).total(), head_passes(sizes, text[1]).total()
    assert few["repair"].total() == once + layers + head  # the losses of the final and of the dense model
    # The start, the steps in between, and the last step.
    for steps, every, looks in ((0, 5, 0), (1, 5, 2), (20, 5, 5), (21, 5, 6), (3, 100, 2), (16, 0, 9), (17, 0, 7)):
        settings = (f"search.forward_passes={16 * steps}", f"search.evaluate_every={every}")
        actual, kl = phase(*settings), phase(*settings, "search.objective=kl")
        assert actual.get("steps", Flops()).total() == (16 * steps + looks) * once
        diverging = 16 * steps * once + steps * (layers + 2 * head) + looks * (once + head) + layers
        assert kl.get("steps", Flops()).total() == (diverging if steps else 0)
        assert kl["repair"].total() == actual["repair"].total() + 2 * head


@pytest.mark.parametrize("objective", ["kl", "kl-hidden"])
def test_the_divergence_of_a_step(objective: str, model: nn.Module) -> None:
    (text,) = random_batches(batches=1)
    divergence = Divergence(Evaluator(PrunableModel.of(model)), float(objective == "kl-hidden"))
    masks = [half(model)] * 10
    expected = counted(lambda: divergence.values(masks, text, [{}] * 10, divergence.dense_states(text)))
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"search.objective={objective}"))
    total = forward_passes(sizes, text, 10) + layer_passes(sizes, [text])
    assert total.total() + 2 * head_passes(sizes, text).total() == pytest.approx(expected, rel=0.01)


def test_dtypes_are_counted_apart_and_take_their_own_time() -> None:
    text = random_batches()
    low, full = (
        flops_by_phase(medium_recipe(), medium_model(dtype), text) for dtype in (torch.bfloat16, torch.float32)
    )
    assert {name: part.total() for name, part in low.items()} == {name: part.total() for name, part in full.items()}
    assert set(low["steps"]) == {torch.bfloat16}
    assert set(low["scores"]) == {torch.bfloat16, torch.float32}
    rates = {torch.bfloat16: 4e9, torch.float32: 2e9, torch.float64: 1e9}
    parts = {"a": Flops({torch.bfloat16: 8, torch.float64: 3}), "b": Flops({torch.float32: 4})}
    assert seconds(parts, rates) == pytest.approx((2 + 3 + 2) / 1e9)
