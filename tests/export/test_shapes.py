"""The form in which a decision is written: what is dropped, what is padded, and that padding adds nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import ShapeRequirements, output_columns, runtime_shapes
from pgprune_cli.model.families.adapter import gather_units
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.prunable import UnitCosts

GROUPS, CHANNELS = 4, 10


def masks(units: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.booleans(), min_size=units, max_size=units).map(lambda drawn: torch.tensor(drawn))


keeps = st.lists(st.builds(LayerMask, masks(GROUPS), masks(CHANNELS)), min_size=1, max_size=4).map(tuple)
all_needs = st.builds(
    ShapeRequirements,
    st.sampled_from(["any", "first", "every"]),
    st.sampled_from(["any", "every"]),
    st.integers(1, 5),
    st.integers(1, 12),
)


@settings(max_examples=200, deadline=None)
@given(keeps, all_needs)
def test_the_padding_is_the_least_that_meets_the_needs(keep, needs):
    if not any(layer.attention.any() or layer.ffn.any() for layer in keep):
        with pytest.raises(UserError, match="keeps nothing"):
            runtime_shapes(keep, needs)
        return
    form = runtime_shapes(keep, needs)
    assert [i for i, k in enumerate(keep) if k.attention.any() or k.ffn.any()] == list(form.layers)
    for index, (kept, written) in enumerate(zip(keep, form.written, strict=True)):
        heads = needs.attention == "every" or (needs.attention == "first" and index == form.layers[0])
        for block, least, multiple in (
            ("attention", heads, needs.kv_multiple),
            ("ffn", needs.ffn == "every", needs.ffn_multiple),
        ):
            before, after = kept.of(block), written.of(block)
            assert after[before].all()
            if index in form.layers:
                units = len(before)
                allowed = [w for w in range(units + 1) if w % multiple == 0 or w == units]
                assert after.sum() == min(w for w in allowed if w >= max(int(before.sum()), int(least)))
            else:
                assert not after.any()
    assert form.padded == any(
        int(k.of(b).sum()) != int(w.of(b).sum())
        for k, w in zip(keep, form.written, strict=True)
        for b in ("attention", "ffn")
    )


@settings(max_examples=100, deadline=None)
@given(keeps, all_needs, all_needs)
def test_needs_together_are_met_both(keep, one, other):
    if not any(layer.attention.any() or layer.ffn.any() for layer in keep):
        return
    both = one.combined(other)
    assert both == other.combined(one) == both.combined(one)
    for needs in (one, other):
        for (groups, channels), (least_groups, least_channels) in zip(
            runtime_shapes(keep, both).sizes(), runtime_shapes(keep, needs).sizes(), strict=True
        ):
            assert groups >= least_groups and (groups % needs.kv_multiple == 0 or groups == GROUPS)
            assert channels >= least_channels and (channels % needs.ffn_multiple == 0 or channels == CHANNELS)


def test_what_pads_counts_as_kept():
    keep = (LayerMask(torch.arange(4) < 1, torch.arange(10) < 3), LayerMask(torch.arange(4) < 0, torch.arange(10) < 8))
    costs = UnitCosts((5, 5), (1, 2))
    total = 4 * 5 * 2 + 10 * 1 + 10 * 2
    assert runtime_shapes(keep, ShapeRequirements()).sparsity(costs) == pytest.approx(1 - (5 + 3 + 16) / total)
    form = runtime_shapes(keep, ShapeRequirements("every", pad_kv_heads=2, pad_ffn=4))
    assert form.sizes() == [(2, 4), (2, 8)]
    assert form.sparsity(costs) == pytest.approx(1 - (10 + 4 + 10 + 16) / total)


def test_uniform_is_alike_in_every_layer_and_with_both_blocks():
    def form(*counts, requirements=ShapeRequirements()):  # noqa: B008
        return runtime_shapes(tuple(LayerMask(torch.arange(4) < a, torch.arange(10) < f) for a, f in counts), requirements)

    assert form((2, 5), (0, 0), (2, 5)).uniform
    assert not form((2, 5), (2, 6)).uniform
    assert not form((0, 5), (0, 5)).uniform
    assert form((2, 5), (1, 6), requirements=ShapeRequirements(pad_kv_heads=2, pad_ffn=3)).uniform


@pytest.mark.parametrize("with_repair", [False, True])
@pytest.mark.parametrize("width", [1, 3])
def test_the_columns_of_padding_are_zeros_at_their_place(with_repair, width):
    kept = torch.tensor([False, True, False, True, False])
    written = torch.tensor([True, True, False, True, True])
    dense = torch.randn(7, 5 * width)
    repaired = torch.randn(7, 2 * width) if with_repair else None
    found = output_columns(dense, kept, written, repaired).unflatten(1, (4, width))
    wanted = gather_units(dense, 1, torch.tensor([1, 3]), 5) if repaired is None else repaired
    assert torch.equal(found[:, 1:3], wanted.unflatten(1, (2, width)))
    assert not found[:, [0, 3]].any()
    nothing = output_columns(dense, torch.zeros(5, dtype=torch.bool), written, None)
    assert nothing.shape == (7, 4 * width) and not nothing.any()
