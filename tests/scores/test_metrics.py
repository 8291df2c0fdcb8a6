"""Every metric against slow, obvious loops over single units, on every architecture."""

from collections.abc import Iterator, Sequence
from typing import get_args

import pytest
import torch
from helpers.blocks import error_root_of, observed_inputs
from helpers.grids import chain_length
from helpers.models import VOCABULARY, tiny_model
from helpers.units import group_units, random_scores
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid, GridCost, chain_of_removal, chain_of_scores
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import UnitTensor
from pgprune_cli.recipe import schema as recipe
from pgprune_cli.scores.metrics import (
    CALIBRATED,
    METRICS,
    NEEDS,
    block_score,
    flat_scores,
    partitions,
    score,
    unit_ranks,
)
from pgprune_cli.scores.obs import chain_errors, removal_order
from pgprune_cli.scores.statistics import BlockStatistics

LAYERS = 4


def calibration(seed: int = 0, batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (2, 20), generator=generator) for _ in range(batches)]


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Block, Grid]]:
    """Yield the name of the scores, the layer, the block and its grid, block after block."""
    prunable = PrunableModel.of(model)
    for index, layer in enumerate(prunable.layers):
        for block in prunable.family.blocks_of(layer):
            yield f"layers.{index}.{block.name}", layer, block, prunable.shape.grids[block.name][index]


def columns_of_element(linear: nn.Linear, grid: Grid, element: int) -> range:
    """Return the columns of an output projection that belong to one element."""
    width = linear.in_features // grid.elements
    return range(element * width, (element + 1) * width)


def rows_of_element(tensor: UnitTensor, grid: Grid, element: int) -> Iterator[tuple[int, float]]:
    """Yield every row of an inner projection that belongs to an element, with its share of the row."""
    start = 0
    for part in tensor.parts:
        shared_by = grid.elements // part.runs
        run = element // shared_by
        yield from ((start + run * part.width + row, 1 / shared_by) for row in range(part.width))
        start += part.rows


def inputs_by_hooks(model: nn.Module, batches: list[Tensor]) -> dict[nn.Module, Tensor]:
    """Return all inputs of every output projection in whole forward passes: `(tokens, in)` float64."""
    inputs_of: dict[nn.Module, list[Tensor]] = {}
    handles = [
        block.output_linear(layer).register_forward_pre_hook(
            lambda module, inputs: inputs_of.setdefault(module, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
        for _, layer, block, _ in blocks_of(model)
    ]
    with torch.no_grad():
        for tokens in batches:
            model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return {module: torch.cat(inputs).double() for module, inputs in inputs_of.items()}


def test_wanda_sp_sums_weight_times_input_norm_over_the_element(architecture: str) -> None:
    model, batches = tiny_model(architecture), calibration()
    norms = {module: inputs.norm(dim=0) for module, inputs in inputs_by_hooks(model, batches).items()}
    scores = score(PrunableModel.of(model), "wanda-sp", batches, seed=0)
    for name, layer, block, grid in blocks_of(model):
        output = block.output_linear(layer)
        assert len(scores[name]) == grid.elements
        for element in range(grid.elements):
            expected = sum(
                float(output.weight[:, column].abs().sum()) * float(norms[output][column])
                for column in columns_of_element(output, grid, element)
            )
            assert float(scores[name][element]) == pytest.approx(expected, rel=1e-5)


def test_flap_sums_variance_times_squared_weight_over_the_element(architecture: str) -> None:
    model, batches = tiny_model(architecture), calibration()
    inputs_of = inputs_by_hooks(model, batches)
    scores = score(PrunableModel.of(model), "flap", batches, seed=0)
    for name, layer, block, grid in blocks_of(model):
        output = block.output_linear(layer)
        for element, element_score in enumerate(scores[name].tolist()):
            expected = 0.0
            for column in columns_of_element(output, grid, element):
                inputs = inputs_of[output][:, column].tolist()
                mean = sum(inputs) / len(inputs)
                variance = sum((value - mean) ** 2 for value in inputs) / (len(inputs) - 1)
                expected += variance * sum(float(weight) ** 2 for weight in output.weight[:, column])
            assert element_score == pytest.approx(expected, rel=1e-4)


def test_flap_adaptive_gives_channels_and_kv_heads_their_mean_z_score(architecture: str) -> None:
    """As in the authors' code: the scores of attention columns are squared, then standardised within the block."""
    model, batches = tiny_model(architecture), calibration()
    inputs_of = inputs_by_hooks(model, batches)
    prunable = PrunableModel.of(model)
    scores = score(prunable, "flap-adaptive", batches, seed=0)
    raw = score(prunable, "flap", batches, seed=0)
    for name, layer, block, grid in blocks_of(model):
        output = block.output_linear(layer)
        columns = inputs_of[output].var(0) * output.weight.double().square().sum(0)
        if block.name == "attention":
            columns = columns.square()
        z_scores = (columns - columns.mean()) / columns.std()
        groups = grid.groups if block.name == "attention" else grid.elements
        expected = z_scores.view(groups, -1).mean(1).sigmoid()
        torch.testing.assert_close(scores[name].view(groups, -1).sum(1), expected, rtol=1e-4, atol=0.0)
        if block.name == "ffn":
            assert scores[name].argsort().tolist() == raw[name].argsort().tolist()


def test_obs_scores_elements_by_their_greedy_removal(architecture: str) -> None:
    """Tests the metric from end to end. test_obs.py tests the removal itself."""
    model, batches = tiny_model(architecture), calibration()
    prunable = PrunableModel.of(model)
    scores = score(prunable, "obs", batches, seed=0)
    roots = error_roots(prunable, batches)
    for name, layer, block, grid in blocks_of(model):
        index = int(name.split(".")[1])
        output = block.output_linear(layer)
        inputs, weights = observed_inputs(model, index, block.name, batches)
        covariance = (inputs * weights[:, None]).T @ inputs / len(inputs)
        weight = error_root_of(model, index, block.name, roots[index]) @ output.weight.double()
        if grid.is_line:
            order, errors = removal_order(weight, covariance, grid.elements)
            assert scores[name].argsort().tolist() == order.tolist()
            torch.testing.assert_close(scores[name][order], errors, rtol=1e-4, atol=0.0)
        else:
            errors = chain_errors(weight, covariance, grid, prunable.shape.parameters[block.name][index])
            assert torch.equal(chain_of_removal(scores[name]), chain_of_removal(errors))
            torch.testing.assert_close(scores[name], errors, rtol=1e-4, atol=0.0)


def test_magnitude_sums_the_squared_weights_of_the_element_in_every_projection(architecture: str) -> None:
    """The query heads of a KV head share the weights of its keys and values equally."""
    model = tiny_model(architecture)
    prunable = PrunableModel.of(model)
    scores = score(prunable, "magnitude", [], seed=0)
    for name, layer, block, grid in blocks_of(model):
        module, output = layer.get_submodule(block.module), block.output_linear(layer)
        tensors = prunable.family.unit_tensors(layer, block)[:-1]
        inner = [tensor for tensor in tensors if tensor.key == "weight" and tensor.module in block.projections]
        for element in range(grid.elements):
            columns = list(columns_of_element(output, grid, element))
            expected = float(output.weight[:, columns].square().sum())
            for tensor in inner:
                weight = module.get_parameter(tensor.name)
                for row, share in rows_of_element(tensor, grid, element):
                    expected += share * float(weight[row].square().sum())
            assert float(scores[name][element]) == pytest.approx(expected, rel=1e-5)


def test_random_scores_differ_in_every_block_and_depend_only_on_the_seed() -> None:
    model = tiny_model("llama-gqa")
    first, repeated, other_seed = (score(PrunableModel.of(model), "random", [], seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert not any(torch.equal(first[name], other_seed[name]) for name in first)
    values = torch.cat(list(first.values()))
    assert len(values.unique()) == len(values) == LAYERS * (8 + 24)
    other_weights = score(PrunableModel.of(tiny_model("llama-gqa", seed=1)), "random", [], 5)
    assert all(torch.equal(first[name], other_weights[name]) for name in first)


def test_uniform_scores_all_units_1() -> None:
    scores = score(PrunableModel.of(tiny_model("mistral")), "uniform", [], seed=0)
    assert all((values == 1.0).all() for values in scores.values())


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_score_returns_one_reproducible_float64_per_element(metric: str) -> None:
    model = tiny_model("qwen2")
    first, repeated = (score(PrunableModel.of(model), metric, calibration(), seed=3) for _ in range(2))
    expected = {f"layers.{i}.{block}": size for i in range(LAYERS) for block, size in (("attention", 8), ("ffn", 24))}
    assert {name: len(values) for name, values in first.items()} == expected
    assert all(values.dtype == torch.float64 and (values >= 0).all() for values in first.values())
    assert not any(values.requires_grad for values in first.values())
    assert all(torch.equal(first[name], repeated[name]) for name in first)


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs", "taylor", "magnitude"])
def test_unit_without_weights_scores_lowest(architecture: str, metric: str) -> None:
    """A higher score means that the unit matters more. The unit is KV head 1, and channel 7."""
    model = tiny_model(architecture)
    prunable = PrunableModel.of(model)
    layer, removed = prunable.layers[2], {}
    for block in prunable.family.blocks_of(layer):
        grid, module = prunable.shape.grids[block.name][2], layer.get_submodule(block.module)
        removed[block.name] = range(grid.members, 2 * grid.members) if block.name == "attention" else range(7, 8)
        for tensor in prunable.family.unit_tensors(layer, block):
            weight = module.get_parameter(tensor.name).movedim(tensor.axis, 0)
            for element in removed[block.name]:
                weight[[row for row, _ in rows_of_element(tensor, grid, element)]] = 0.0
    scores = score(prunable, metric, calibration(), seed=0)
    for name, elements in removed.items():
        values = scores[f"layers.2.{name}"]
        assert sorted(values.argsort()[: len(elements)].tolist()) == list(elements)
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
        METRICS[metric](BlockStatistics(Grid(2, 1), GridCost(1), {"o": torch.ones(3, 4)}, {}, seed=0))
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
@pytest.mark.parametrize("metric", ["magnitude", "obs"])
def test_flat_scores_follow_the_axis_of_the_space(families: tuple[str, ...], metric: str) -> None:
    """A KV head scores the sum of its query heads, or the error by the time that both are removed."""
    shape = PrunableModel.of(tiny_model("llama-gqa")).shape
    space, units = group_units(shape, families)
    scores = {}
    for layer in range(LAYERS):
        scores[f"layers.{layer}.attention"] = 1000.0 * layer + torch.arange(8, dtype=torch.float64)
        scores[f"layers.{layer}.ffn"] = 1e6 * (layer + 1) + torch.arange(24, dtype=torch.float64)
    expected: list[float] = []
    for family in families:
        for layer in range(LAYERS):
            attention, ffn = scores[f"layers.{layer}.attention"].tolist(), scores[f"layers.{layer}.ffn"].tolist()
            of_pair = of_block = max if metric == "obs" else sum
            expected += {
                "attention": [of_pair(attention[head : head + 2]) for head in range(0, 8, 2)],
                "ffn": ffn,
                "attention-block": [of_block(attention)],
                "ffn-block": [of_block(ffn)],
                "layer": [of_block(attention) + of_block(ffn)],
            }[family]
    flat = flat_scores(scores, space, units, shape.grids, metric)
    assert flat.tolist() == expected
    assert len(flat) == space.n


def test_whole_blocks_of_experts_score_the_sum_of_their_experts_errors() -> None:
    grid = Grid(groups=2, members=3, separate=True)
    scores = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0, 7.0])
    assert float(block_score(scores, grid, "obs")) == 5.0 + 7.0
    assert float(block_score(scores, grid, "magnitude")) == 22.0
    assert float(block_score(scores[:0], grid, "obs")) == 0.0


# --- units


@pytest.mark.parametrize("metric", ["magnitude", "obs"])
def test_units_of_a_width_search_are_steps_of_the_chain_that_the_scores_say(architecture: str, metric: str) -> None:
    prunable = PrunableModel.of(tiny_model(architecture))
    shape = prunable.shape
    scores = score(prunable, metric, calibration(), seed=0)
    units = partitions(shape, ("attention", "ffn"), False, shape.parameters, scores, metric)
    for (layer, block), partition in units.items():
        grid, values = shape.grids[block][layer], scores[f"layers.{layer}.{block}"]
        ranks = unit_ranks(values, partition, grid, metric)
        if grid.is_line:
            assert torch.equal(partition, torch.arange(grid.elements)) and torch.equal(ranks, values)
        elif metric == "obs":
            assert ranks.tolist() == [-float(unit) for unit in range(chain_length(grid))]
            last_first = values.unique().flip(0)
            assert torch.equal(last_first[partition], values)  # one step, one score
        else:
            assert torch.equal(partition, chain_of_scores(values, grid, shape.parameters[block][layer]))


def test_units_are_whole_groups_in_a_unit_search_and_where_elements_cost_nothing() -> None:
    shape = PrunableModel.of(tiny_model("llama-gqa")).shape
    scores = random_scores(shape)
    cache = {"attention": (GridCost(0, 7),) * LAYERS, "ffn": (GridCost(3),) * LAYERS}
    for by_group, costs in ((True, shape.parameters), (True, cache), (False, cache)):
        units = partitions(shape, ("attention", "ffn", "layer"), by_group, costs, scores, "obs")
        assert set(units) == {(layer, block) for layer in range(LAYERS) for block in ("attention", "ffn")}
        assert units[0, "attention"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert units[0, "ffn"].tolist() == list(range(24))
    chain = partitions(shape, ("attention",), False, shape.parameters, scores, "magnitude")
    assert int(chain[0, "attention"].max()) + 1 == chain_length(shape.grids["attention"][0]) == 5


def test_groups_are_ranked_by_the_scores_of_their_elements() -> None:
    scores, partition, grid = torch.tensor([1.0, 5.0, 4.0, 3.0]), torch.tensor([0, 0, 1, 1]), Grid(2, 2)
    assert unit_ranks(scores, partition, grid, "magnitude").tolist() == [6.0, 7.0]
    assert unit_ranks(scores, partition, grid, "obs").tolist() == [5.0, 4.0]


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
