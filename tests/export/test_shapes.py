"""The shapes of an export: which layers are removed, what is padded, and that padding adds nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.grids import is_regular
from helpers.messages import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.core.grid import Grid, GridCost, first_elements
from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import RuntimeShapes, ShapeRequirements, inner_rows, output_columns, runtime_shapes
from pgprune_cli.model.families.llama import LLAMA
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.prunable import Shape
from pgprune_cli.model.unit_tensors import KeptElements, Part, UnitTensor, gather

ATTENTION, FFN = Grid(4, 2), Grid(1, 10, shared_rows=False)


def shape_of(
    layers: int, attention: Grid = ATTENTION, ffn: Grid = FFN, costs: tuple[GridCost, ...] = (GridCost(3), GridCost(1))
) -> Shape:
    """Return the shape of a dense model whose layers are alike."""
    blocks = ({block.name: block for block in LLAMA.blocks},) * layers
    grids = {"attention": (attention,) * layers, "ffn": (ffn,) * layers}
    return Shape(LLAMA, blocks, grids, {"attention": (costs[0],) * layers, "ffn": (costs[1],) * layers})


@st.composite
def masks(draw: st.DrawFn, grid: Grid) -> torch.Tensor:
    """A regular mask."""
    groups = draw(st.sets(st.integers(0, grid.groups - 1)))
    members, mask = draw(st.integers(1, grid.members)), torch.zeros(grid.groups, grid.members, dtype=torch.bool)
    for group in groups:
        mask[group, draw(st.permutations(range(grid.members)))[:members]] = True
    return mask.flatten()


model_masks = st.lists(st.builds(LayerMask, masks(ATTENTION), masks(FFN)), min_size=1, max_size=4).map(tuple)
all_requirements = st.builds(
    ShapeRequirements,
    st.sampled_from(["any", "first", "every"]),
    st.sampled_from(["any", "every"]),
    st.integers(1, 5),
    st.integers(1, 12),
)


def keep(*counts: tuple[int, int]) -> ModelMask:
    """Return a mask that keeps the first KV heads and channels of every layer, by the numbers given."""
    return tuple(LayerMask(first_elements(ATTENTION, a, 2), torch.arange(10) < f) for a, f in counts)


def is_empty(model_mask: ModelMask) -> bool:
    return not any(layer.attention.any() or layer.ffn.any() for layer in model_mask)


def least(kept: int, minimum: int, multiple: int, all_of_them: int) -> int:
    """Return the least allowed number: a multiple, or all."""
    allowed = [n for n in range(all_of_them + 1) if n % multiple == 0 or n == all_of_them]
    return min(n for n in allowed if n >= max(kept, minimum))


@settings(max_examples=200, deadline=None)
@given(model_masks, all_requirements)
def test_padding_is_the_least_that_meets_the_requirements(
    model_mask: ModelMask, requirements: ShapeRequirements
) -> None:
    dense = shape_of(len(model_mask))
    if is_empty(model_mask):
        with pytest.raises(UserError, match="keeps no units"):
            runtime_shapes(dense, model_mask, requirements)
        return
    shapes = runtime_shapes(dense, model_mask, requirements)
    assert [i for i, k in enumerate(model_mask) if k.attention.any() or k.ffn.any()] == list(shapes.layers)
    fewest = min((ATTENTION.kept(layer.attention)[1] for layer in model_mask if layer.attention.any()), default=1)
    for index, (kept, written) in enumerate(zip(model_mask, shapes.written, strict=True)):
        assert written.attention[kept.attention].all() and written.ffn[kept.ffn].all()
        assert is_regular(ATTENTION, written.attention)
        if index not in shapes.layers:
            assert not written.attention.any() and not written.ffn.any()
            continue
        needs_head = requirements.attention == "every" or (
            requirements.attention == "first" and index == shapes.layers[0]
        )
        heads, queries = ATTENTION.kept(kept.attention)
        expected = least(heads, needs_head, requirements.pad_kv_heads, 4)
        assert ATTENTION.kept(written.attention) == ((expected, queries or fewest) if expected else (0, 0))
        channels = least(int(kept.ffn.sum()), requirements.ffn == "every", requirements.pad_ffn, 10)
        assert int(written.ffn.sum()) == channels
    assert shapes.padded == any(
        int(k.of(b).sum()) != int(w.of(b).sum())
        for k, w in zip(model_mask, shapes.written, strict=True)
        for b in ("attention", "ffn")
    )


@settings(max_examples=100, deadline=None)
@given(model_masks, all_requirements, all_requirements)
def test_combined_requirements_meet_both(
    model_mask: ModelMask, first: ShapeRequirements, second: ShapeRequirements
) -> None:
    if is_empty(model_mask):
        return
    dense = shape_of(len(model_mask))
    both = first.combined(second)
    assert both == second.combined(first) == both.combined(first)
    for requirements in (first, second):
        for size, minimum in zip(
            runtime_shapes(dense, model_mask, both).sizes(),
            runtime_shapes(dense, model_mask, requirements).sizes(),
            strict=True,
        ):
            heads, channels = size["attention"][0], size["ffn"][1]
            assert heads >= minimum["attention"][0] and channels >= minimum["ffn"][1]
            assert heads % requirements.pad_kv_heads == 0 or heads == 4
            assert channels % requirements.pad_ffn == 0 or channels == 10


def test_a_decision_that_keeps_nothing_is_refused() -> None:
    with refused("decision.json", "keeps no units"):
        runtime_shapes(shape_of(2), keep((0, 0), (0, 0)), ShapeRequirements())


def test_sparsity_counts_padding_as_kept() -> None:
    model_mask = keep((1, 3), (0, 8))
    dense = shape_of(2, costs=(GridCost(2, 1), GridCost(1)))  # a KV head with its query heads costs 5
    total = 2 * (4 * 5 + 10)
    plain = runtime_shapes(dense, model_mask, ShapeRequirements())
    assert plain.sparsity == pytest.approx(1 - (5 + 3 + 8) / total)
    padded = runtime_shapes(dense, model_mask, ShapeRequirements("every", pad_kv_heads=2, pad_ffn=4))
    assert padded.sizes() == [{"attention": (2, 2), "ffn": (1, 4)}, {"attention": (2, 2), "ffn": (1, 8)}]
    assert padded.sparsity == pytest.approx(1 - (10 + 4 + 10 + 8) / total)


def test_shapes_are_uniform_when_all_written_layers_have_the_same_sizes_and_both_blocks() -> None:
    def shapes(*counts: tuple[int, int], requirements: ShapeRequirements | None = None) -> RuntimeShapes:
        return runtime_shapes(shape_of(len(counts)), keep(*counts), requirements or ShapeRequirements())

    assert shapes((2, 5), (0, 0), (2, 5)).uniform
    assert not shapes((2, 5), (2, 6)).uniform
    assert not shapes((0, 5), (0, 5)).uniform
    assert shapes((2, 5), (1, 6), requirements=ShapeRequirements(pad_kv_heads=2, pad_ffn=3)).uniform
    fewer_queries = (LayerMask(first_elements(ATTENTION, 2, 1), torch.arange(10) < 5), keep((2, 5))[0])
    assert not runtime_shapes(shape_of(2), fewer_queries, ShapeRequirements()).uniform


@pytest.mark.parametrize("with_repair", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_output_columns_of_padding_are_zero(with_repair: bool, width: int) -> None:
    kept = torch.tensor([False, True, False, True, False])
    written = torch.tensor([True, True, False, True, True])
    tensor = UnitTensor("o.weight", 1, (Part(5, width),))
    dense = torch.randn(7, 5 * width)
    repaired = torch.randn(7, 2 * width) if with_repair else None
    columns = output_columns(dense, tensor, kept, written, repaired).unflatten(1, (4, width))
    expected = gather(dense, tensor, KeptElements(kept)) if repaired is None else repaired
    assert torch.equal(columns[:, 1:3], expected.unflatten(1, (2, width)))
    assert not columns[:, [0, 3]].any()
    nothing = output_columns(dense, tensor, torch.zeros(5, dtype=torch.bool), written, None)
    assert nothing.shape == (7, 4 * width) and not nothing.any()


@pytest.mark.parametrize("with_repair", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_stacked_output_columns_of_padding_are_zero(with_repair: bool, axis: int) -> None:
    """Three experts of four channels: expert 0 has none, expert 1 is kept and padded, expert 2 is all padding."""
    kept = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    written = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    tensor = UnitTensor("down", axis, (Part(4, 1),), stacked=True)
    dense = torch.randn(3, 4, 7) if axis == 1 else torch.randn(3, 7, 4)
    expected = dense.movedim(axis, 1)[1, [1, 3]]
    repaired = torch.randn(1, 2, 7) if axis == 1 else torch.randn(1, 7, 2)
    if with_repair:
        expected = repaired.movedim(axis, 1)[0]
    masks = (kept.flatten(), written.flatten(), repaired if with_repair else None)
    columns = output_columns(dense, tensor, *masks).movedim(axis, 1)
    assert columns.shape == (2, 3, 7)
    assert torch.equal(columns[0, 1:], expected)
    assert not columns[0, 0].any() and not columns[1].any()


def test_inner_rows_of_padding_are_those_of_the_base_model() -> None:
    """A fused projection of 4 query heads in 2 groups: queries of 3 rows each, keys and values of 3 rows a group."""
    kept, written = torch.tensor([0, 0, 0, 1], dtype=torch.bool), torch.tensor([0, 1, 1, 1], dtype=torch.bool)
    tensor = UnitTensor("qkv.weight", 0, (Part(4, 3), Part(2, 3), Part(2, 3)))
    dense, repaired = torch.randn(24, 7), torch.randn(9, 7)
    rows = inner_rows(dense, tensor, kept, written, repaired).unflatten(0, (7, 3))
    runs, own = dense.unflatten(0, (8, 3)), repaired.unflatten(0, (3, 3))
    assert torch.equal(rows, torch.stack([runs[1], runs[2], own[0], runs[4], own[1], runs[6], own[2]]))
    assert torch.equal(inner_rows(dense, tensor, kept, written, None), gather(dense, tensor, KeptElements(written)))
    assert torch.equal(inner_rows(dense, tensor, kept, kept, repaired), repaired)


def test_stacked_inner_rows_of_padding_are_those_of_the_base_model() -> None:
    """Three experts of four channels: expert 0 has none, expert 1 is kept and padded, expert 2 is all padding."""
    kept = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    written = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.bool)
    tensor = UnitTensor("gate_up", 1, (Part(4, 1), Part(4, 1)), stacked=True)
    dense, repaired = torch.randn(3, 8, 7), torch.randn(1, 4, 7)
    rows = inner_rows(dense, tensor, kept.flatten(), written.flatten(), repaired)
    (own,) = repaired
    assert torch.equal(rows[0], torch.stack([dense[1, 0], own[0], own[1], dense[1, 4], own[2], own[3]]))
    assert torch.equal(rows[1], dense[2, [0, 1, 2, 4, 5, 6]])
