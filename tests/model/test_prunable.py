"""Where the units are: sizes, costs, masks as keep decisions, gathering."""

import pytest
import torch
from helpers.models import ARCHITECTURES, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pgprune_cli.errors import UserError
from pgprune_cli.model.families.__init__ import family_of
from pgprune_cli.model.families.adapter import gather_units
from pgprune_cli.model.prunable import PrunableModel, Shape, UnitCosts


def prunable_parameters(config, **changes: int) -> int:
    """Parameters of a model's linear layers, counted on a model that transformers itself builds that small."""
    from transformers import AutoModelForCausalLM

    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    return sum(parameter.numel() for linear in linears for parameter in linear.parameters())


def test_a_unit_costs_the_parameters_that_a_model_without_it_lacks(architecture: str) -> None:
    """Against a model whose config has one KV head (with its query heads) or one channel less, in all 4 layers."""
    config = tiny_config(architecture)
    heads, groups, channels = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    whole = prunable_parameters(tiny_config(architecture))
    fewer_groups = prunable_parameters(
        tiny_config(architecture), num_attention_heads=heads - heads // groups, num_key_value_heads=groups - 1
    )
    fewer_channels = prunable_parameters(tiny_config(architecture), intermediate_size=channels - 1)
    shape = Shape.of(tiny_model(architecture))
    assert sum(shape.kv_head_parameters) == whole - fewer_groups
    assert sum(shape.channel_parameters) == whole - fewer_channels
    assert len(set(shape.kv_head_parameters)) == len(set(shape.channel_parameters)) == 1


def test_sizes_are_read_off_the_model(architecture: str) -> None:
    shape = Shape.of(tiny_model(architecture))
    assert shape.kv_heads == (4, 4, 4, 4)
    assert shape.channels == (24, 24, 24, 24)


def test_a_model_on_the_meta_device_has_the_same_shape(architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(architecture))
    assert PrunableModel.of(empty).shape == Shape.of(tiny_model(architecture))


def test_families_cost_the_same_whether_counted_by_unit_by_block_or_by_layer(architecture: str) -> None:
    shape = Shape.of(tiny_model(architecture))
    by_unit, by_block, by_layer = (
        shape.space(names).costs.sum() for names in (("attention", "ffn"), ("attention-block", "ffn-block"), ("layer",))
    )
    assert by_unit == by_block == by_layer
    assert shape.space(("layer",)).n == 4
    assert shape.space(("ffn", "attention")).slice_of("attention") == slice(96, 112)
    assert shape.space(("attention-block",)).costs.tolist() == [4 * cost for cost in shape.kv_head_parameters]


def test_units_may_cost_something_else_than_parameters() -> None:
    shape = Shape.of(tiny_model("llama-gqa"))
    assert shape.space(("attention", "ffn")) == shape.space(("attention", "ffn"), shape.parameters)
    costs = UnitCosts((1, 2, 3, 4), (10, 20, 30, 40))
    units = shape.space(("attention", "ffn"), costs)
    assert units.pair_costs.tolist() == [1, 2, 3, 4, 10, 20, 30, 40]
    assert units.pair_counts.tolist() == [4] * 4 + [24] * 4
    blocks = shape.space(("attention-block", "ffn-block"), costs)
    assert blocks.costs.tolist() == [4, 8, 12, 16, 240, 480, 720, 960]
    assert shape.space(("layer",), costs).costs.tolist() == [244, 488, 732, 976]
    cache = UnitCosts((5,) * 4, (0,) * 4)  # layers can go where only a part of them costs anything
    assert shape.space(("layer",), cache).costs.tolist() == [20] * 4


def test_a_mask_of_units_says_what_stays_of_every_layer() -> None:
    shape = Shape.of(tiny_model("llama-gqa"))
    space = shape.space(("attention", "ffn"))
    mask = torch.rand(space.n, generator=torch.Generator().manual_seed(0)) < 0.5
    keep = shape.keep(space, mask)
    assert torch.equal(torch.cat([layer.attention for layer in keep]), mask[:16])
    assert torch.equal(torch.cat([layer.ffn for layer in keep]), mask[16:])
    assert all(torch.equal(layer.of("attention"), layer.attention) for layer in keep)
    assert all(torch.equal(layer.of("ffn"), layer.ffn) for layer in keep)


@pytest.mark.parametrize(
    ("families", "mask", "attention", "ffn"),
    [
        (("layer",), [1, 0, 1, 1], [4, 0, 4, 4], [24, 0, 24, 24]),
        (("attention-block", "ffn-block"), [0, 1, 1, 1, 1, 1, 0, 0], [0, 4, 4, 4], [24, 24, 0, 0]),
        (("ffn-block",), [1, 1, 1, 0], [4, 4, 4, 4], [24, 24, 24, 0]),
    ],
)
def test_a_mask_of_blocks_says_what_stays_of_every_layer(
    families: tuple[str, ...], mask: list[int], attention: list[int], ffn: list[int]
) -> None:
    shape = Shape.of(tiny_model("llama-gqa"))
    keep = shape.keep(shape.space(families), torch.tensor(mask, dtype=torch.bool))
    assert [int(layer.attention.sum()) for layer in keep] == attention
    assert [int(layer.ffn.sum()) for layer in keep] == ffn
    assert [len(layer.ffn) for layer in keep] == [24] * 4


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
def test_gathering_units_equals_a_loop(units: int, width: int, axis: int, other: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1)))
    sizes = (units * width, other) if axis == 0 else (other, units * width)
    weight = torch.arange(units * width * other, dtype=torch.float32).view(sizes)
    gathered = gather_units(weight, axis, torch.tensor(kept), units)
    assert torch.equal(gathered, gathered_by_loop(weight, axis, kept, units))
    gathered += 1.0
    assert torch.equal(weight.flatten(), torch.arange(units * width * other, dtype=torch.float32))
    bias = torch.arange(units * width, dtype=torch.float32)
    assert torch.equal(gather_units(bias, 0, torch.tensor(kept), units), gathered_by_loop(bias, 0, kept, units))


def test_gathering_no_units_leaves_nothing() -> None:
    for width in (1, 3):
        assert gather_units(torch.ones(4 * width, 2), 0, torch.empty(0, dtype=torch.int64), 4).shape == (0, 2)


def test_the_prunable_linear_layers_in_order() -> None:
    layer = tiny_model("llama-gqa").model.layers[0]
    found = [
        (block, projection.name, projection.axis) for block, projection, _ in projections(family_of("llama"), layer)
    ]
    assert found == [
        *[("attention", name, axis) for name, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1))],
        *[("ffn", name, axis) for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))],
    ]
    modules = {id(module) for _, _, module in projections(family_of("llama"), layer)}
    assert modules == {id(module) for module in layer.modules() if isinstance(module, nn.Linear)}


def test_an_unsupported_model_type_is_named_with_those_that_are_supported() -> None:
    with pytest.raises(
        UserError, match="model type 'phi3' is not supported; pgprune prunes llama, mistral, qwen2, qwen3"
    ):
        family_of("phi3")


def test_every_supported_model_type_is_tested() -> None:
    tested = {tiny_config(architecture).model_type for architecture in ARCHITECTURES}
    assert tested == set(family_of("llama").model_types)
