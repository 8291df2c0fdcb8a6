"""Every metric against slow, obvious loops over single units, on every architecture."""

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from helpers.blocks import seen
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor, nn

from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.model.prunable import PrunableModel, Shape
from pgprune_cli.recipe import schema as recipe
from pgprune_cli.scores.metrics import CALIBRATED, METRICS, NEEDS, flat_scores, score
from pgprune_cli.scores.obs import removal_order
from pgprune_cli.scores.statistics import BlockStatistics

HEAD, CHANNELS, GROUPS, LAYERS = 8, 24, 4, 4


def calibration(seed: int = 0, batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (2, 20), generator=generator) for _ in range(batches)]


def queries_a_group(layer: nn.Module) -> int:
    return layer.self_attn.q_proj.out_features // layer.self_attn.k_proj.out_features


def columns_of_group(layer: nn.Module, group: int) -> list[int]:
    """The columns of o_proj (and rows of q_proj) that belong to one KV head."""
    width = queries_a_group(layer) * HEAD
    return list(range(group * width, (group + 1) * width))


def piles_by_hooks(model: nn.Module, batches: list[Tensor]) -> dict[nn.Module, Tensor]:
    """All inputs of every o_proj and down_proj in whole forward passes, in one pile: `(tokens, in)` float64."""
    piles: dict[nn.Module, list[Tensor]] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda module, inputs: piles.setdefault(module, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
        for layer in model.model.layers
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    with torch.no_grad():
        for tokens in batches:
            model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return {module: torch.cat(pile).double() for module, pile in piles.items()}


def test_wanda_sp_is_weight_times_input_norm_summed_over_the_unit(architecture: str) -> None:
    model, batches = tiny_model(architecture), calibration()
    norms = {module: pile.norm(dim=0) for module, pile in piles_by_hooks(model, batches).items()}
    scores = score(PrunableModel.of(model), "wanda-sp", batches, seed=0)
    for index, layer in enumerate(model.model.layers):
        output, down = layer.self_attn.o_proj, layer.mlp.down_proj
        for group in range(GROUPS):
            wanted = sum(
                float(output.weight[:, column].abs().sum()) * float(norms[output][column])
                for column in columns_of_group(layer, group)
            )
            assert float(scores[f"layers.{index}.attention"][group]) == pytest.approx(wanted, rel=1e-5)
        for channel in range(CHANNELS):
            wanted = float(down.weight[:, channel].abs().sum()) * float(norms[down][channel])
            assert float(scores[f"layers.{index}.ffn"][channel]) == pytest.approx(wanted, rel=1e-5)


def test_flap_is_variance_times_squared_weight_summed_over_the_unit(architecture: str) -> None:
    model, batches = tiny_model(architecture), calibration()
    piles = piles_by_hooks(model, batches)
    scores = score(PrunableModel.of(model), "flap", batches, seed=0)
    for index, layer in enumerate(model.model.layers):
        for name, output, columns_of in (
            ("attention", layer.self_attn.o_proj, lambda unit, layer=layer: columns_of_group(layer, unit)),
            ("ffn", layer.mlp.down_proj, lambda unit: [unit]),
        ):
            for unit, got in enumerate(scores[f"layers.{index}.{name}"].tolist()):
                wanted = 0.0
                for column in columns_of(unit):
                    seen = piles[output][:, column].tolist()
                    mean = sum(seen) / len(seen)
                    variance = sum((value - mean) ** 2 for value in seen) / (len(seen) - 1)
                    wanted += variance * sum(float(weight) ** 2 for weight in output.weight[:, column])
                assert got == pytest.approx(wanted, rel=1e-4)


def test_obs_removes_greedily_what_the_inputs_say(architecture: str) -> None:
    """The metric end to end; the order itself is tested in test_obs.py."""
    model, batches = tiny_model(architecture), calibration()
    scores, roots = (
        score(PrunableModel.of(model), "obs", batches, seed=0),
        error_roots(PrunableModel.of(model), batches),
    )
    for index, layer in enumerate(model.model.layers):
        for name, output, units in (
            ("attention", layer.self_attn.o_proj, GROUPS),
            ("ffn", layer.mlp.down_proj, CHANNELS),
        ):
            inputs, weights = seen(model, index, name, batches)
            covariance = (inputs * weights[:, None]).T @ inputs / len(inputs)
            order, errors = removal_order(roots[index] @ output.weight.double(), covariance, units)
            got = scores[f"layers.{index}.{name}"]
            assert got.argsort().tolist() == order.tolist()
            torch.testing.assert_close(got[order], errors, rtol=1e-4, atol=0.0)


def test_magnitude_is_the_squared_weights_of_the_unit_in_every_projection(architecture: str) -> None:
    model = tiny_model(architecture)
    scores = score(PrunableModel.of(model), "magnitude", [], seed=0)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for group in range(GROUPS):
            rows = columns_of_group(layer, group)
            wanted = sum(float(attention.q_proj.weight[row].square().sum()) for row in rows)
            wanted += sum(float(attention.o_proj.weight[:, row].square().sum()) for row in rows)
            for row in range(group * HEAD, (group + 1) * HEAD):
                wanted += float(
                    attention.k_proj.weight[row].square().sum() + attention.v_proj.weight[row].square().sum()
                )
            assert float(scores[f"layers.{index}.attention"][group]) == pytest.approx(wanted, rel=1e-5)
        for channel in range(CHANNELS):
            wanted = sum(float(linear.weight[channel].square().sum()) for linear in (mlp.gate_proj, mlp.up_proj))
            wanted += float(mlp.down_proj.weight[:, channel].square().sum())
            assert float(scores[f"layers.{index}.ffn"][channel]) == pytest.approx(wanted, rel=1e-5)


def test_random_draws_every_block_anew_and_depends_on_the_seed_alone() -> None:
    model = tiny_model("llama-gqa")
    one, same, other = (score(PrunableModel.of(model), "random", [], seed) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    drawn = torch.cat(list(one.values()))
    assert len(drawn.unique()) == LAYERS * (GROUPS + CHANNELS)
    again = score(PrunableModel.of(tiny_model("llama-gqa", seed=1)), "random", [], 5)
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_uniform_knows_nothing() -> None:
    scores = score(PrunableModel.of(tiny_model("mistral")), "uniform", [], seed=0)
    assert all((values == 1.0).all() for values in scores.values())


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_scores_are_one_float64_for_every_unit_and_the_same_again(metric: str) -> None:
    model = tiny_model("qwen2")
    one, same = (score(PrunableModel.of(model), metric, calibration(), seed=3) for _ in range(2))
    wanted = {f"layers.{i}.{block}": size for i in range(LAYERS) for block, size in (("attention", 4), ("ffn", 24))}
    assert {name: len(values) for name, values in one.items()} == wanted
    assert all(values.dtype == torch.float64 and (values >= 0).all() for values in one.values())
    assert not any(values.requires_grad for values in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs", "taylor", "magnitude"])
def test_a_unit_without_weights_matters_least(architecture: str, metric: str) -> None:
    """Higher = matters more: what writes nothing to the residual stream can go first."""
    model = tiny_model(architecture)
    layer = model.model.layers[2]
    for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj):
        weight = projection.weight if projection is layer.self_attn.q_proj else projection.weight.T
        weight[columns_of_group(layer, 1)] = 0.0
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.weight[HEAD : 2 * HEAD] = 0.0
    layer.mlp.gate_proj.weight[7] = layer.mlp.up_proj.weight[7] = layer.mlp.down_proj.weight[:, 7] = 0.0
    scores = score(PrunableModel.of(model), metric, calibration(), seed=0)
    assert int(scores["layers.2.attention"].argmin()) == 1
    assert int(scores["layers.2.ffn"].argmin()) == 7
    assert float(scores["layers.2.ffn"][7]) == 0.0
    assert scores["layers.1.ffn"].min() > 0.0


def test_only_calibrated_metrics_read_the_text() -> None:
    class Refuse(Sequence[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, _):
            raise AssertionError("read")

    model = tiny_model("llama-mha")
    for metric in METRICS:
        if metric in CALIBRATED:
            with pytest.raises(AssertionError, match="read"):
                score(PrunableModel.of(model), metric, Refuse(), seed=0)
        else:
            score(PrunableModel.of(model), metric, Refuse(), seed=0)


@pytest.mark.parametrize("metric", sorted(CALIBRATED))
def test_collecting_leaves_no_hooks_behind_even_when_it_fails(metric: str) -> None:
    model = tiny_model("llama-gqa")
    with pytest.raises(IndexError):
        score(PrunableModel.of(model), metric, [torch.full((1, 4), VOCABULARY)], seed=0)
    score(PrunableModel.of(model), metric, calibration(), seed=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("metric", sorted(CALIBRATED))
def test_a_calibrated_metric_without_text_is_refused(metric: str) -> None:
    with pytest.raises(ValueError, match=f"{metric} needs calibration text"):
        METRICS[metric](BlockStatistics(2, {"o": torch.ones(3, 4)}, seed=0))
    with pytest.raises(ValueError, match="no calibration text"):
        score(PrunableModel.of(tiny_model("llama-mha")), metric, [], seed=0)


def test_recipes_offer_exactly_the_registered_metrics() -> None:
    assert set(get_args(recipe.ScoreSettings.__annotations__["metric"])) == set(METRICS)
    assert set(METRICS) >= CALIBRATED == set(NEEDS)


@pytest.mark.parametrize(
    "families",
    [
        ("attention", "ffn"),
        ("ffn", "attention"),
        ("attention-block", "ffn-block"),
        ("attention", "ffn-block"),
        ("layer",),
    ],
)
def test_scores_lie_along_the_axis_of_the_space(families: tuple[str, ...]) -> None:
    shape = Shape.of(tiny_model("llama-gqa"))
    scores = {}
    for layer in range(LAYERS):
        scores[f"layers.{layer}.attention"] = 1000.0 * layer + torch.arange(GROUPS, dtype=torch.float64)
        scores[f"layers.{layer}.ffn"] = 1e6 * (layer + 1) + torch.arange(CHANNELS, dtype=torch.float64)
    expected: list[float] = []
    for family in families:
        for layer in range(LAYERS):
            attention, ffn = scores[f"layers.{layer}.attention"].tolist(), scores[f"layers.{layer}.ffn"].tolist()
            expected += {
                "attention": attention,
                "ffn": ffn,
                "attention-block": [sum(attention)],
                "ffn-block": [sum(ffn)],
                "layer": [sum(attention) + sum(ffn)],
            }[family]
    space = shape.space(families)
    flat = flat_scores(scores, shape, space)
    assert flat.tolist() == expected
    assert len(flat) == space.n


@pytest.mark.parametrize("metric", METRICS)
def test_layers_are_scored_apart_as_they_are_together(metric: str) -> None:
    """Bit for bit: processes divide them."""
    model = tiny_model("llama-gqa")
    text = [torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))]
    whole = score(PrunableModel.of(model), metric, text, 0)
    parts = [score(PrunableModel.of(model), metric, text, 0, range(rank, 4, 3)) for rank in range(3)] + [
        score(PrunableModel.of(model), metric, text, 0, [])
    ]
    assert sum(map(len, parts)) == len(whole) == 8
    for part in parts:
        for name, values in part.items():
            assert torch.equal(values, whole[name])
