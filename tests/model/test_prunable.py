"""The shape of a model: its sizes, what its units cost, and masks over them; and how units are gathered."""

import pytest
import torch
from helpers.models import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pgprune_cli.model.families.adapter import gather_units
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


def test_a_unit_costs_the_parameters_that_a_smaller_model_lacks(architecture: str) -> None:
    """Compares with models that have one KV head (with its query heads) or one channel less in all 4 layers."""
    config = tiny_config(architecture)
    heads, kv_heads, channels = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    dense = prunable_parameters(tiny_config(architecture))
    fewer_kv_heads = prunable_parameters(
        tiny_config(architecture), num_attention_heads=heads - heads // kv_heads, num_key_value_heads=kv_heads - 1
    )
    fewer_channels = prunable_parameters(tiny_config(architecture), intermediate_size=channels - 1)
    parameters = shape_of(architecture).parameters
    assert sum(parameters["attention"]) == dense - fewer_kv_heads
    assert sum(parameters["ffn"]) == dense - fewer_channels
    assert len(set(parameters["attention"])) == len(set(parameters["ffn"])) == 1


def test_shape_has_the_sizes_of_the_model(architecture: str) -> None:
    shape = shape_of(architecture)
    assert shape.units == {"attention": (4, 4, 4, 4), "ffn": (24, 24, 24, 24)}
    assert shape.layers == 4


def test_shape_is_the_same_on_the_meta_device(architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(architecture))
    assert PrunableModel.of(empty).shape == shape_of(architecture)


def test_space_costs_the_same_by_unit_by_block_and_by_layer(architecture: str) -> None:
    shape = shape_of(architecture)
    by_unit, by_block, by_layer = (
        shape.space(names).costs.sum() for names in (("attention", "ffn"), ("attention-block", "ffn-block"), ("layer",))
    )
    assert by_unit == by_block == by_layer
    assert shape.space(("layer",)).n == 4
    assert shape.space(("ffn", "attention")).slice_of("attention") == slice(96, 112)
    assert shape.space(("attention-block",)).costs.tolist() == [4 * cost for cost in shape.parameters["attention"]]


def test_space_takes_other_costs_than_parameters() -> None:
    shape = shape_of("llama-gqa")
    assert shape.space(("attention", "ffn")) == shape.space(("attention", "ffn"), shape.parameters)
    costs = {"attention": (1, 2, 3, 4), "ffn": (10, 20, 30, 40)}
    units = shape.space(("attention", "ffn"), costs)
    assert units.pair_costs.tolist() == [1, 2, 3, 4, 10, 20, 30, 40]
    assert units.pair_counts.tolist() == [4] * 4 + [24] * 4
    blocks = shape.space(("attention-block", "ffn-block"), costs)
    assert blocks.costs.tolist() == [4, 8, 12, 16, 240, 480, 720, 960]
    assert shape.space(("layer",), costs).costs.tolist() == [244, 488, 732, 976]
    cache = {"attention": (5,) * 4, "ffn": (0,) * 4}  # a layer of which only one block costs anything
    assert shape.space(("layer",), cache).costs.tolist() == [20] * 4


def test_model_mask_of_a_mask_over_units() -> None:
    shape = shape_of("llama-gqa")
    space = shape.space(("attention", "ffn"))
    mask = torch.rand(space.n, generator=torch.Generator().manual_seed(0)) < 0.5
    model_mask = shape.model_mask(space, mask)
    assert torch.equal(torch.cat([layer.attention for layer in model_mask]), mask[:16])
    assert torch.equal(torch.cat([layer.ffn for layer in model_mask]), mask[16:])
    assert all(torch.equal(layer.of("attention"), layer.attention) for layer in model_mask)
    assert all(torch.equal(layer.of("ffn"), layer.ffn) for layer in model_mask)


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
    model_mask = shape.model_mask(shape.space(families), torch.tensor(mask, dtype=torch.bool))
    assert [int(layer.attention.sum()) for layer in model_mask] == attention
    assert [int(layer.ffn.sum()) for layer in model_mask] == ffn
    assert [len(layer.ffn) for layer in model_mask] == [24] * 4


def gathered_by_loop(tensor: Tensor, axis: int, kept: list[int], units: int) -> Tensor:
    width = tensor.shape[axis] // units
    return torch.cat([tensor.narrow(axis, unit * width, width) for unit in kept], axis)


@given(
    units=st.integers(1, 6),
    width=st.integers(1, 4),
    axis=st.sampled_from([0, 1]),
    other=st.integers(1, 3),
    data=st.data(),
)
@settings(deadline=None)
def test_gather_units_equals_a_loop(units: int, width: int, axis: int, other: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1)))
    sizes = (units * width, other) if axis == 0 else (other, units * width)
    weight = torch.arange(units * width * other, dtype=torch.float32).view(sizes)
    gathered = gather_units(weight, axis, torch.tensor(kept), units)
    assert torch.equal(gathered, gathered_by_loop(weight, axis, kept, units))
    gathered += 1.0
    assert torch.equal(weight.flatten(), torch.arange(units * width * other, dtype=torch.float32))
    bias = torch.arange(units * width, dtype=torch.float32)
    assert torch.equal(gather_units(bias, 0, torch.tensor(kept), units), gathered_by_loop(bias, 0, kept, units))


def test_gather_units_of_none_is_empty() -> None:
    for width in (1, 3):
        assert gather_units(torch.ones(4 * width, 2), 0, torch.empty(0, dtype=torch.int64), 4).shape == (0, 2)
