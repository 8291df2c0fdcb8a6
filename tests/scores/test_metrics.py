"""Every metric against slow, obvious loops over single units, on every architecture."""

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from helpers.blocks import observed_inputs
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor, nn

from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe import schema as recipe
from pgprune_cli.scores.metrics import CALIBRATED, METRICS, NEEDS, flat_scores, score
from pgprune_cli.scores.obs import removal_order
from pgprune_cli.scores.statistics import BlockStatistics

HEAD, CHANNELS, KV_HEADS, LAYERS = 8, 24, 4, 4


def calibration(seed: int = 0, batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (2, 20), generator=generator) for _ in range(batches)]


def query_heads_per_kv_head(layer: nn.Module) -> int:
    return layer.self_attn.q_proj.out_features // layer.self_attn.k_proj.out_features


def query_columns(layer: nn.Module, kv_head: int) -> list[int]:
    """Return the columns of o_proj, which are the rows of q_proj, that belong to one KV head."""
    width = query_heads_per_kv_head(layer) * HEAD
    return list(range(kv_head * width, (kv_head + 1) * width))


def inputs_by_hooks(model: nn.Module, batches: list[Tensor]) -> dict[nn.Module, Tensor]:
    """Return all inputs of every o_proj and down_proj in whole forward passes: `(tokens, in)` float64."""
    inputs_of: dict[nn.Module, list[Tensor]] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda module, inputs: inputs_of.setdefault(module, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
        for layer in model.model.layers
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    with torch.no_grad():
        for tokens in batches:
            model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return {module: torch.cat(inputs).double() for module, inputs in inputs_of.items()}


def test_wanda_sp_sums_weight_times_input_norm_over_the_unit(architecture: str) -> None:
    model, batches = tiny_model(architecture), calibration()
    norms = {module: inputs.norm(dim=0) for module, inputs in inputs_by_hooks(model, batches).items()}
    scores = score(PrunableModel.of(model), "wanda-sp", batches, seed=0)
    for index, layer in enumerate(model.model.layers):
        output, down = layer.self_attn.o_proj, layer.mlp.down_proj
        for kv_head in range(KV_HEADS):
            expected = sum(
                float(output.weight[:, column].abs().sum()) * float(norms[output][column])
                for column in query_columns(layer, kv_head)
            )
            assert float(scores[f"layers.{index}.attention"][kv_head]) == pytest.approx(expected, rel=1e-5)
        for channel in range(CHANNELS):
            expected = float(down.weight[:, channel].abs().sum()) * float(norms[down][channel])
            assert float(scores[f"layers.{index}.ffn"][channel]) == pytest.approx(expected, rel=1e-5)


def test_flap_sums_variance_times_squared_weight_over_the_unit(architecture: str) -> None:
    model, batches = tiny_model(architecture), calibration()
    inputs_of = inputs_by_hooks(model, batches)
    scores = score(PrunableModel.of(model), "flap", batches, seed=0)
    for index, layer in enumerate(model.model.layers):
        for name, output, columns_of in (
            ("attention", layer.self_attn.o_proj, lambda unit, layer=layer: query_columns(layer, unit)),
            ("ffn", layer.mlp.down_proj, lambda unit: [unit]),
        ):
            for unit, unit_score in enumerate(scores[f"layers.{index}.{name}"].tolist()):
                expected = 0.0
                for column in columns_of(unit):
                    inputs = inputs_of[output][:, column].tolist()
                    mean = sum(inputs) / len(inputs)
                    variance = sum((value - mean) ** 2 for value in inputs) / (len(inputs) - 1)
                    expected += variance * sum(float(weight) ** 2 for weight in output.weight[:, column])
                assert unit_score == pytest.approx(expected, rel=1e-4)


def test_obs_scores_units_by_their_greedy_removal_order(architecture: str) -> None:
    """Tests the metric from end to end. test_obs.py tests the order itself."""
    model, batches = tiny_model(architecture), calibration()
    scores = score(PrunableModel.of(model), "obs", batches, seed=0)
    roots = error_roots(PrunableModel.of(model), batches)
    for index, layer in enumerate(model.model.layers):
        for name, output, units in (
            ("attention", layer.self_attn.o_proj, KV_HEADS),
            ("ffn", layer.mlp.down_proj, CHANNELS),
        ):
            inputs, weights = observed_inputs(model, index, name, batches)
            covariance = (inputs * weights[:, None]).T @ inputs / len(inputs)
            order, errors = removal_order(roots[index] @ output.weight.double(), covariance, units)
            block_scores = scores[f"layers.{index}.{name}"]
            assert block_scores.argsort().tolist() == order.tolist()
            torch.testing.assert_close(block_scores[order], errors, rtol=1e-4, atol=0.0)


def test_magnitude_sums_the_squared_weights_of_the_unit_in_every_projection(architecture: str) -> None:
    model = tiny_model(architecture)
    scores = score(PrunableModel.of(model), "magnitude", [], seed=0)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for kv_head in range(KV_HEADS):
            rows = query_columns(layer, kv_head)
            expected = sum(float(attention.q_proj.weight[row].square().sum()) for row in rows)
            expected += sum(float(attention.o_proj.weight[:, row].square().sum()) for row in rows)
            for row in range(kv_head * HEAD, (kv_head + 1) * HEAD):
                expected += float(
                    attention.k_proj.weight[row].square().sum() + attention.v_proj.weight[row].square().sum()
                )
            assert float(scores[f"layers.{index}.attention"][kv_head]) == pytest.approx(expected, rel=1e-5)
        for channel in range(CHANNELS):
            expected = sum(float(linear.weight[channel].square().sum()) for linear in (mlp.gate_proj, mlp.up_proj))
            expected += float(mlp.down_proj.weight[:, channel].square().sum())
            assert float(scores[f"layers.{index}.ffn"][channel]) == pytest.approx(expected, rel=1e-5)


def test_random_scores_differ_in_every_block_and_depend_only_on_the_seed() -> None:
    model = tiny_model("llama-gqa")
    first, repeated, other_seed = (score(PrunableModel.of(model), "random", [], seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert not any(torch.equal(first[name], other_seed[name]) for name in first)
    values = torch.cat(list(first.values()))
    assert len(values.unique()) == LAYERS * (KV_HEADS + CHANNELS)
    other_weights = score(PrunableModel.of(tiny_model("llama-gqa", seed=1)), "random", [], 5)
    assert all(torch.equal(first[name], other_weights[name]) for name in first)


def test_uniform_scores_all_units_1() -> None:
    scores = score(PrunableModel.of(tiny_model("mistral")), "uniform", [], seed=0)
    assert all((values == 1.0).all() for values in scores.values())


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_score_returns_one_reproducible_float64_per_unit(metric: str) -> None:
    model = tiny_model("qwen2")
    first, repeated = (score(PrunableModel.of(model), metric, calibration(), seed=3) for _ in range(2))
    expected = {f"layers.{i}.{block}": size for i in range(LAYERS) for block, size in (("attention", 4), ("ffn", 24))}
    assert {name: len(values) for name, values in first.items()} == expected
    assert all(values.dtype == torch.float64 and (values >= 0).all() for values in first.values())
    assert not any(values.requires_grad for values in first.values())
    assert all(torch.equal(first[name], repeated[name]) for name in first)


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs", "taylor", "magnitude"])
def test_unit_without_weights_scores_lowest(architecture: str, metric: str) -> None:
    """A higher score means that the unit matters more."""
    model = tiny_model(architecture)
    layer = model.model.layers[2]
    for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj):
        weight = projection.weight if projection is layer.self_attn.q_proj else projection.weight.T
        weight[query_columns(layer, 1)] = 0.0
    for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.weight[HEAD : 2 * HEAD] = 0.0
    layer.mlp.gate_proj.weight[7] = layer.mlp.up_proj.weight[7] = layer.mlp.down_proj.weight[:, 7] = 0.0
    scores = score(PrunableModel.of(model), metric, calibration(), seed=0)
    assert int(scores["layers.2.attention"].argmin()) == 1
    assert int(scores["layers.2.ffn"].argmin()) == 7
    assert float(scores["layers.2.ffn"][7]) == 0.0
    assert scores["layers.1.ffn"].min() > 0.0


def test_score_reads_the_text_only_for_calibrated_metrics() -> None:
    class UnreadableBatches(Sequence[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, _):
            raise AssertionError("the text was read")

    model = tiny_model("llama-mha")
    for metric in METRICS:
        if metric in CALIBRATED:
            with pytest.raises(AssertionError, match="the text was read"):
                score(PrunableModel.of(model), metric, UnreadableBatches(), seed=0)
        else:
            score(PrunableModel.of(model), metric, UnreadableBatches(), seed=0)


@pytest.mark.parametrize("metric", sorted(CALIBRATED))
def test_score_leaves_no_hooks_behind_even_when_it_fails(metric: str) -> None:
    model = tiny_model("llama-gqa")
    with pytest.raises(IndexError):
        score(PrunableModel.of(model), metric, [torch.full((1, 4), VOCABULARY)], seed=0)
    score(PrunableModel.of(model), metric, calibration(), seed=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("metric", sorted(CALIBRATED))
def test_calibrated_metric_is_refused_without_text(metric: str) -> None:
    with pytest.raises(ValueError, match=f"{metric} needs calibration text"):
        METRICS[metric](BlockStatistics(2, {"o": torch.ones(3, 4)}, seed=0))
    with pytest.raises(ValueError, match="no calibration text"):
        score(PrunableModel.of(tiny_model("llama-mha")), metric, [], seed=0)


def test_recipes_accept_exactly_the_registered_metrics() -> None:
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
def test_flat_scores_follow_the_axis_of_the_space(families: tuple[str, ...]) -> None:
    space = PrunableModel.of(tiny_model("llama-gqa")).shape.space(families)
    scores = {}
    for layer in range(LAYERS):
        scores[f"layers.{layer}.attention"] = 1000.0 * layer + torch.arange(KV_HEADS, dtype=torch.float64)
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
    flat = flat_scores(scores, space)
    assert flat.tolist() == expected
    assert len(flat) == space.n


@pytest.mark.parametrize("metric", METRICS)
def test_score_gives_the_same_bits_when_layers_are_divided(metric: str) -> None:
    """Processes divide the layers among them."""
    model = tiny_model("llama-gqa")
    text = [torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))]
    all_scores = score(PrunableModel.of(model), metric, text, 0)
    parts = [score(PrunableModel.of(model), metric, text, 0, range(rank, 4, 3)) for rank in range(3)] + [
        score(PrunableModel.of(model), metric, text, 0, [])
    ]
    assert sum(map(len, parts)) == len(all_scores) == 8
    for part in parts:
        for name, values in part.items():
            assert torch.equal(values, all_scores[name])
