"""Gathering the kept rows of unit tensors, against naive indexing: fused, stacked, biases and 8-bit weights."""

from __future__ import annotations

import pytest
import torch
from helpers.masks import MODEL_MASKS, random_elements
from helpers.models import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import Fp8Linear, Int8Linear
from pgprune_cli.model.unit_tensors import KeptElements, Part, UnitTensor, gather, gather_runs, kept_shape


def kept_rows(tensor: UnitTensor, grid: Grid, mask: Tensor) -> list[int]:
    """Return the rows along the axis that belong to kept elements or groups, in order."""
    rows, start = [], 0
    for part in tensor.parts:
        for run in range(part.runs):
            elements = mask.tolist()[run * grid.elements // part.runs : (run + 1) * grid.elements // part.runs]
            if any(elements):
                rows += range(start + run * part.width, start + (run + 1) * part.width)
        start += part.rows
    return rows


def gathered_by_hand(values: Tensor, tensor: UnitTensor, grid: Grid, mask: Tensor) -> Tensor:
    """Return the kept rows by naive indexing, one row at a time."""
    if not tensor.stacked:
        rows = kept_rows(tensor, grid, mask)
        return torch.cat([values.narrow(tensor.axis, row, 1) for row in rows], tensor.axis)
    groups = []
    for group in range(grid.groups):
        members = mask[group * grid.members : (group + 1) * grid.members]
        if members.any():
            single = UnitTensor(tensor.name, tensor.axis - 1, tensor.parts)
            groups.append(gathered_by_hand(values[group], single, Grid(1, grid.members), members))
    return torch.stack(groups)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Grid, Tensor, list[Part], int]:
    """A grid, a regular mask that keeps something, and the parts of a fused tensor with its other size."""
    grid = Grid(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    seed = draw(st.integers(0, 999))
    size = draw(st.integers(1, grid.groups)), draw(st.integers(1, grid.members))
    mask = random_elements(grid, *size, torch.Generator().manual_seed(seed))
    runs = st.sampled_from([grid.elements, grid.groups])
    parts = draw(st.lists(st.builds(Part, runs, st.integers(1, 3)), min_size=1, max_size=3))
    return grid, mask, parts, draw(st.integers(1, 3))


QKV = Grid(2, 2), torch.tensor([False, True, True, False]), [Part(4, 3), Part(2, 3), Part(2, 3)], 5


@given(problems(), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=150)
@example(QKV, 0)
def test_gather_picks_the_rows_of_every_part(problem: tuple[Grid, Tensor, list[Part], int], axis: int) -> None:
    """Queries, keys and values may be one tensor, whose parts have runs per element and per group."""
    grid, mask, parts, other = problem
    tensor = UnitTensor("fused.weight", axis, tuple(parts))
    rows = sum(part.rows for part in parts)
    weight = torch.arange(rows * other, dtype=torch.float32).view((rows, other) if axis == 0 else (other, rows))
    before = weight.clone()
    gathered = gather(weight, tensor, KeptElements(mask))
    assert torch.equal(gathered, gathered_by_hand(weight, tensor, grid, mask))
    assert gathered.shape == kept_shape(tensor, weight.shape, mask)
    gathered += 1.0
    assert torch.equal(weight, before)  # the result is a new tensor
    bias_tensor = UnitTensor("fused.bias", 0, tuple(parts))
    bias = torch.arange(rows, dtype=torch.float32)
    assert torch.equal(
        gather(bias, bias_tensor, KeptElements(mask)), bias[torch.tensor(kept_rows(bias_tensor, grid, mask))]
    )


@given(problems(), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=150)
def test_gather_picks_the_members_of_every_stacked_group(
    problem: tuple[Grid, Tensor, list[Part], int], axis: int
) -> None:
    """Experts lie along the first axis of one tensor, each with members of its own."""
    grid, mask, parts, other = problem
    parts = [Part(grid.members, part.width) for part in parts]
    tensor = UnitTensor("experts.gate_up", axis, tuple(parts), stacked=True)
    rows = sum(part.rows for part in parts)
    sizes = (grid.groups, rows, other) if axis == 1 else (grid.groups, other, rows)
    weight = torch.arange(grid.groups * rows * other, dtype=torch.float32).view(sizes)
    gathered = gather(weight, tensor, KeptElements(mask))
    assert torch.equal(gathered, gathered_by_hand(weight, tensor, grid, mask))
    assert gathered.shape == kept_shape(tensor, weight.shape, mask) and gathered.is_contiguous()
    bias = weight.select(3 - axis, 0)
    bias_tensor = UnitTensor("experts.gate_up_bias", 1, tuple(parts), stacked=True)
    assert torch.equal(gather(bias, bias_tensor, KeptElements(mask)), gathered_by_hand(bias, bias_tensor, grid, mask))


@given(problems())
@settings(deadline=None, max_examples=60)
@example(QKV)
def test_gather_of_rounded_weights_equals_rounded_gathered_weights(
    problem: tuple[Grid, Tensor, list[Part], int],
) -> None:
    grid, mask, parts, other = problem
    generator = torch.Generator().manual_seed(other)
    for axis, quantized_class in ((0, Int8Linear), (1, Int8Linear), (0, Fp8Linear), (1, Fp8Linear)):
        tensor = UnitTensor("fused.weight", axis, tuple(parts if axis == 0 else parts[:1]))
        rows = sum(part.rows for part in tensor.parts)
        linear = nn.Linear(*((other, rows) if axis == 0 else (rows, other)), bias=False)
        linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
        rounded = quantized_class(linear)
        expected = gathered_by_hand(rounded.weight, tensor, grid, mask)
        rounded.kept = rounded.gathered(tensor, KeptElements(mask))
        assert torch.equal(rounded.weight, expected)


def test_gather_of_nothing_is_empty() -> None:
    for width in (1, 3):
        assert gather_runs(torch.ones(4 * width, 2), 0, torch.empty(0, dtype=torch.int64), 4).shape == (0, 2)


def test_kept_elements_index_runs_of_elements_and_of_groups() -> None:
    kept = KeptElements(torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool))  # 3 groups of 2
    cpu = torch.device("cpu")
    assert kept.runs(6, cpu).tolist() == [2, 5]
    assert kept.runs(3, cpu).tolist() == [1, 2]
    assert kept.runs(3, cpu) is kept.runs(3, cpu)  # made once
    groups, members = kept.members(3)
    assert (groups.tolist(), members.tolist()) == ([1, 2], [[0], [1]])


@pytest.mark.parametrize("name", MODEL_MASKS)
def test_gather_picks_the_kept_rows_of_a_model(architecture: str, name: str) -> None:
    model = PrunableModel.of(tiny_model(architecture))
    for index, (layer, layer_mask) in enumerate(zip(model.layers, MODEL_MASKS[name](model.module), strict=True)):
        for block in model.family.blocks_of(layer):
            grid, mask = model.shape.grids[block.name][index], layer_mask.of(block.name)
            for tensor in model.family.unit_tensors(layer, block) if mask.any() else ():
                values = layer.get_submodule(block.module).get_parameter(tensor.name)
                gathered = gather(values, tensor, KeptElements(mask))
                assert torch.equal(gathered, gathered_by_hand(values, tensor, grid, mask))
                assert gathered.shape == kept_shape(tensor, values.shape, mask)
