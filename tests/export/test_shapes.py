"""The shapes of an export: which layers are removed, what is padded, and that padding adds nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.messages import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import RuntimeShapes, ShapeRequirements, output_columns, runtime_shapes
from pgprune_cli.model.families.adapter import gather_units
from pgprune_cli.model.masks import LayerMask, ModelMask

KV_HEADS, CHANNELS = 4, 10


def masks(units: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.booleans(), min_size=units, max_size=units).map(lambda drawn: torch.tensor(drawn))


model_masks = st.lists(st.builds(LayerMask, masks(KV_HEADS), masks(CHANNELS)), min_size=1, max_size=4).map(tuple)
all_requirements = st.builds(
    ShapeRequirements,
    st.sampled_from(["any", "first", "every"]),
    st.sampled_from(["any", "every"]),
    st.integers(1, 5),
    st.integers(1, 12),
)


def keep(*counts: tuple[int, int]) -> ModelMask:
    """Return a mask that keeps the first KV heads and channels of every layer, by the numbers given."""
    return tuple(LayerMask(torch.arange(KV_HEADS) < a, torch.arange(CHANNELS) < f) for a, f in counts)


def is_empty(model_mask: ModelMask) -> bool:
    return not any(layer.attention.any() or layer.ffn.any() for layer in model_mask)


@settings(max_examples=200, deadline=None)
@given(model_masks, all_requirements)
def test_padding_is_the_least_that_meets_the_requirements(
    model_mask: ModelMask, requirements: ShapeRequirements
) -> None:
    if is_empty(model_mask):
        with pytest.raises(UserError, match="keeps no units"):
            runtime_shapes(model_mask, requirements)
        return
    shapes = runtime_shapes(model_mask, requirements)
    assert [i for i, k in enumerate(model_mask) if k.attention.any() or k.ffn.any()] == list(shapes.layers)
    for index, (kept, written) in enumerate(zip(model_mask, shapes.written, strict=True)):
        needs_head = requirements.attention == "every" or (
            requirements.attention == "first" and index == shapes.layers[0]
        )
        for block, minimum, multiple in (
            ("attention", needs_head, requirements.pad_kv_heads),
            ("ffn", requirements.ffn == "every", requirements.pad_ffn),
        ):
            before, after = kept.of(block), written.of(block)
            assert after[before].all()
            if index in shapes.layers:
                units = len(before)
                allowed = [w for w in range(units + 1) if w % multiple == 0 or w == units]
                assert after.sum() == min(w for w in allowed if w >= max(int(before.sum()), int(minimum)))
            else:
                assert not after.any()
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
    both = first.combined(second)
    assert both == second.combined(first) == both.combined(first)
    for requirements in (first, second):
        for size, minimum in zip(
            runtime_shapes(model_mask, both).sizes(), runtime_shapes(model_mask, requirements).sizes(), strict=True
        ):
            for block, multiple, units in (
                ("attention", requirements.pad_kv_heads, KV_HEADS),
                ("ffn", requirements.pad_ffn, CHANNELS),
            ):
                assert size[block] >= minimum[block]
                assert size[block] % multiple == 0 or size[block] == units


def test_a_decision_that_keeps_nothing_is_refused() -> None:
    with refused("decision.json", "keeps no units"):
        runtime_shapes(keep((0, 0), (0, 0)), ShapeRequirements())


def test_sparsity_counts_padding_as_kept() -> None:
    model_mask = keep((1, 3), (0, 8))
    costs = {"attention": (5, 5), "ffn": (1, 2)}
    total = 4 * 5 * 2 + 10 * 1 + 10 * 2
    plain = runtime_shapes(model_mask, ShapeRequirements())
    assert plain.sparsity(costs) == pytest.approx(1 - (5 + 3 + 16) / total)
    padded = runtime_shapes(model_mask, ShapeRequirements("every", pad_kv_heads=2, pad_ffn=4))
    assert padded.sizes() == [{"attention": 2, "ffn": 4}, {"attention": 2, "ffn": 8}]
    assert padded.sparsity(costs) == pytest.approx(1 - (10 + 4 + 10 + 16) / total)


def test_shapes_are_uniform_when_all_written_layers_have_the_same_sizes_and_both_blocks() -> None:
    def shapes(*counts: tuple[int, int], requirements: ShapeRequirements | None = None) -> RuntimeShapes:
        return runtime_shapes(keep(*counts), requirements or ShapeRequirements())

    assert shapes((2, 5), (0, 0), (2, 5)).uniform
    assert not shapes((2, 5), (2, 6)).uniform
    assert not shapes((0, 5), (0, 5)).uniform
    assert shapes((2, 5), (1, 6), requirements=ShapeRequirements(pad_kv_heads=2, pad_ffn=3)).uniform


@pytest.mark.parametrize("with_repair", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_output_columns_of_padding_are_zero(with_repair: bool, width: int) -> None:
    kept = torch.tensor([False, True, False, True, False])
    written = torch.tensor([True, True, False, True, True])
    dense = torch.randn(7, 5 * width)
    repaired = torch.randn(7, 2 * width) if with_repair else None
    columns = output_columns(dense, kept, written, repaired).unflatten(1, (4, width))
    expected = gather_units(dense, 1, torch.tensor([1, 3]), 5) if repaired is None else repaired
    assert torch.equal(columns[:, 1:3], expected.unflatten(1, (2, width)))
    assert not columns[:, [0, 3]].any()
    nothing = output_columns(dense, torch.zeros(5, dtype=torch.bool), written, None)
    assert nothing.shape == (7, 4 * width) and not nothing.any()
