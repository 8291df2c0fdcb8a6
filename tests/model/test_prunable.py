"""The shape of a model: its sizes, what its elements and groups cost, and masks over them."""

import pytest
import torch
from helpers.grids import is_regular
from helpers.masks import is_dense
from helpers.models import tiny_config, tiny_model
from helpers.units import chain_units, group_units
from torch import nn

from pgprune_cli.core.grid import GridCost
from pgprune_cli.model.prunable import PrunableModel, Shape


def shape_of(architecture: str) -> Shape:
    return PrunableModel.of(tiny_model(architecture)).shape


def prunable_parameters(config, **changes: int) -> int:
    """Count the parameters of all linear layers of a model that transformers builds from a changed config."""
    from transformers import AutoModelForCausalLM

    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    return sum(parameter.numel() for linear in linears for parameter in linear.parameters())


LLAMAS = ("llama-mha", "llama-gqa", "llama-biased", "mistral", "qwen2", "qwen3")
"""Architectures of which transformers builds a model with any number of heads and channels."""


@pytest.mark.parametrize("architecture", LLAMAS)
def test_elements_and_groups_cost_the_parameters_that_a_smaller_model_lacks(architecture: str) -> None:
    """Compares with models that have fewer KV heads, query heads or channels in all 4 layers."""
    config = tiny_config(architecture)
    heads, kv_heads, channels = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    dense = prunable_parameters(tiny_config(architecture))
    fewer_kv_heads = prunable_parameters(
        tiny_config(architecture), num_attention_heads=heads - heads // kv_heads, num_key_value_heads=kv_heads - 1
    )
    fewer_channels = prunable_parameters(tiny_config(architecture), intermediate_size=channels - 1)
    shape = shape_of(architecture)
    (attention,), (ffn,) = ({*by_layer} for by_layer in shape.parameters.values())
    whole = shape.grids["attention"][0]
    assert 4 * (attention.of_whole(whole) - attention.of(kv_heads - 1, whole.members)) == dense - fewer_kv_heads
    assert 4 * ffn.element == dense - fewer_channels
    assert ffn == GridCost(ffn.element)
    if heads > kv_heads:
        fewer_queries = prunable_parameters(tiny_config(architecture), num_attention_heads=heads - kv_heads)
        assert 4 * kv_heads * attention.element == dense - fewer_queries


def test_shape_has_the_sizes_of_the_model(architecture: str) -> None:
    shape = shape_of(architecture)
    for layer in range(4):
        attention, ffn = (shape.grids[name][layer] for name in ("attention", "ffn"))
        assert attention.groups == 4
        delta_net = architecture == "qwen3_5_text" and layer < 3  # key heads, with their value heads
        assert attention.members == (1 if architecture == "llama-mha" or delta_net else 2)
        assert (ffn.groups, ffn.members) in ((1, 24), (8, 12))
    assert shape.layers == 4
    assert shape.elements["attention"] == tuple(grid.elements for grid in shape.grids["attention"])
    assert shape.unit_counts["attention"] == [4] * 4


def test_shape_is_the_same_on_the_meta_device(architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(architecture))
    assert PrunableModel.of(empty).shape == shape_of(architecture)


def test_space_costs_the_same_by_unit_by_step_by_block_and_by_layer(architecture: str) -> None:
    shape = shape_of(architecture)
    whole = shape.cost(shape.parameters)
    for families in (("attention", "ffn"), ("attention-block", "ffn-block"), ("layer",)):
        assert int(group_units(shape, families)[0].costs.sum()) == whole
    assert int(chain_units(shape)[0].costs.sum()) == whole
    assert group_units(shape, ("layer",))[0].n == 4
    ffn_units = sum(shape.unit_counts["ffn"])
    assert group_units(shape, ("ffn", "attention"))[0].slice_of("attention") == slice(ffn_units, ffn_units + 16)
    blocks, _ = group_units(shape, ("attention-block",))
    pairs = zip(shape.grids["attention"], shape.parameters["attention"], strict=True)
    assert blocks.costs.tolist() == [cost.of_whole(grid) for grid, cost in pairs]


def test_every_width_of_a_chain_costs_what_its_mask_keeps(architecture: str) -> None:
    shape = shape_of(architecture)
    space, units = chain_units(shape)
    place = torch.arange(space.n) - space.pair_starts[space.pair_of]
    for width in (1, 2, 3, 5, 11):
        mask = place < width
        model_mask = shape.model_mask(space, mask, units)
        assert shape.cost(shape.parameters, model_mask) == int(space.costs[mask].sum())
        for grids, masks in (
            (shape.grids["attention"], [layer.attention for layer in model_mask]),
            (shape.grids["ffn"], [layer.ffn for layer in model_mask]),
        ):
            assert all(is_regular(grid, mask) for grid, mask in zip(grids, masks, strict=True))


def test_space_takes_other_costs_than_parameters() -> None:
    shape = shape_of("llama-gqa")
    assert group_units(shape)[0] == group_units(shape, ("attention", "ffn"), shape.parameters)[0]
    costs = {
        "attention": tuple(GridCost(cost, 5) for cost in (1, 2, 3, 4)),
        "ffn": tuple(map(GridCost, (10, 20, 30, 40))),
    }
    units, _ = group_units(shape, ("attention", "ffn"), costs)
    assert [family.costs for family in units.families] == [(7, 9, 11, 13), (10, 20, 30, 40)]
    assert units.pair_counts.tolist() == [4] * 4 + [24] * 4
    blocks, _ = group_units(shape, ("attention-block", "ffn-block"), costs)
    assert blocks.costs.tolist() == [28, 36, 44, 52, 240, 480, 720, 960]
    assert group_units(shape, ("layer",), costs)[0].costs.tolist() == [268, 516, 764, 1012]
    cache = {"attention": (GridCost(0, 5),) * 4, "ffn": (GridCost(0),) * 4}  # only one block of a layer costs anything
    assert group_units(shape, ("layer",), cache)[0].costs.tolist() == [20] * 4


def test_model_mask_of_a_mask_over_units() -> None:
    shape = shape_of("llama-gqa")
    space, units = group_units(shape)
    mask = torch.rand(space.n, generator=torch.Generator().manual_seed(0)) < 0.5
    model_mask = shape.model_mask(space, mask, units)
    assert torch.equal(torch.cat([layer.attention for layer in model_mask]), mask[:16].repeat_interleave(2))
    assert torch.equal(torch.cat([layer.ffn for layer in model_mask]), mask[16:])
    assert all(torch.equal(layer.of("attention"), layer.attention) for layer in model_mask)
    assert all(torch.equal(layer.of("ffn"), layer.ffn) for layer in model_mask)
    for kept, layer in zip(shape.kept(model_mask), model_mask, strict=True):
        kv_heads, channels = int(layer.attention.sum()) // 2, int(layer.ffn.sum())
        assert kept == {"attention": (kv_heads, 2 if kv_heads else 0), "ffn": (min(channels, 1), channels)}


def test_blocks_outside_the_space_are_kept(architecture: str) -> None:
    shape = shape_of(architecture)
    space, units = group_units(shape, ("ffn",))
    model_mask = shape.model_mask(space, torch.zeros(space.n).bool(), units)
    assert all(layer.attention.all() and not layer.ffn.any() for layer in model_mask)
    assert is_dense(shape.model_mask(space, torch.ones(space.n).bool(), units))


@pytest.mark.parametrize(
    ("families", "mask", "attention", "ffn"),
    [
        (("layer",), [1, 0, 1, 1], [4, 0, 4, 4], [24, 0, 24, 24]),
        (("attention-block", "ffn-block"), [0, 1, 1, 1, 1, 1, 0, 0], [0, 4, 4, 4], [24, 24, 0, 0]),
        (("ffn-block",), [1, 1, 1, 0], [4, 4, 4, 4], [24, 24, 24, 0]),
    ],
    ids=["layers", "blocks", "ffn-blocks"],
)
def test_model_mask_of_a_mask_over_blocks(
    families: tuple[str, ...], mask: list[int], attention: list[int], ffn: list[int]
) -> None:
    shape = shape_of("llama-gqa")
    space, units = group_units(shape, families)
    model_mask = shape.model_mask(space, torch.tensor(mask, dtype=torch.bool), units)
    assert [int(layer.attention.sum()) // 2 for layer in model_mask] == attention
    assert [int(layer.ffn.sum()) for layer in model_mask] == ffn
    assert [len(layer.ffn) for layer in model_mask] == [24] * 4
