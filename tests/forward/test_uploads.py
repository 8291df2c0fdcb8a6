"""Repaired weights reach their blocks whole and in time, wherever they are placed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.lanes import PlainLane
from helpers.masks import MODEL_MASKS, random_repair, random_tokens
from helpers.models import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.forward.uploads import SLOTS, Ring, Uploads, evenly
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel

CPU = torch.device("cpu")


# --- placement


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(0, 30_000))
def test_taken_items_fit_and_are_spread_evenly(sizes: list[int], room: int) -> None:
    chosen = evenly(sizes, room)
    taken = [size * fits for size, fits in zip(sizes, chosen, strict=True)]
    assert sum(taken) <= room
    assert all(chosen) == (room >= sum(sizes))
    for first in range(len(sizes)):  # of any first items no more than their share, and less by one item at most
        share = min(room / sum(sizes), 1.0) * sum(sizes[: first + 1])
        assert share - max(sizes[: first + 1]) <= sum(taken[: first + 1]) <= share + 1e-6


def test_every_other_item_is_taken_when_half_fits() -> None:
    assert evenly([10] * 6, 30) == [False, True, False, True, False, True]
    assert evenly([10] * 6, 29) == [False, False, True, False, True, False]
    assert (evenly([], 10), evenly([5], 0)) == ([], [False])


# --- one pass through a ring


def weights(count: int) -> list[Tensor]:
    """Return weights of several sizes, stored as rows or as columns."""
    generator = torch.Generator().manual_seed(0)
    return [
        matrix.T if place % 2 else matrix
        for place, matrix in enumerate(torch.randn(3 + n, 5, generator=generator) for n in range(count))
    ]


@pytest.fixture
def lane() -> PlainLane:
    return PlainLane(CPU, 4 * 5 * 20)


@pytest.fixture
def worker():
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield executor


@pytest.mark.parametrize("count", [0, 1, SLOTS - 1, SLOTS, 10])
def test_weights_arrive_in_order_while_earlier_ones_are_used(count: int, lane: PlainLane, worker) -> None:
    sent = weights(count)
    ring = Ring(lane, sent, worker)
    for place, weight in enumerate(sent):
        arrived = ring.take(place)
        assert torch.equal(arrived, weight) and arrived.stride() == weight.stride()
        worker.submit(lambda: None).result()
        ahead = [slot for event, slot in lane.events if event == "copied"]
        assert ahead == [each % SLOTS for each in range(min(place + SLOTS, count))]  # two are there already
        ring.release(place)
    ring.close()
    assert [event for event, _ in lane.events].count("copied") == count


def test_pass_that_starts_again_gets_the_right_weights(lane: PlainLane, worker) -> None:
    sent = weights(7)
    ring = Ring(lane, sent, worker)
    for upto in (4, 0, 6, 7):  # the block after these fails, and the next pass begins at the first
        for place in range(upto):
            assert torch.equal(ring.take(place), sent[place])
            ring.release(place)
    ring.close()


def test_copy_that_fails_is_an_error_where_the_weight_is_needed(lane: PlainLane, worker, monkeypatch) -> None:
    def fail(slot: int, weight: Tensor) -> None:
        raise OSError("the file is gone")

    monkeypatch.setattr(lane, "copy", fail)
    ring = Ring(lane, weights(2), worker)
    with pytest.raises(OSError, match="the file is gone"):
        ring.take(0)


# --- forward passes


def problem() -> tuple[nn.Module, list[ModelMask], list[RepairedBlocks]]:
    model = tiny_model("llama-biased")
    masks = [MODEL_MASKS[name](model) for name in ("random", "an empty layer")]
    return model, masks, [random_repair(model, mask, bias=True) for mask in masks]


def uploads_of(repaired: list[RepairedBlocks], share: float) -> tuple[Uploads, list[PlainLane]]:
    """Return uploads of the weights of both repairs, of which a share has room on the device."""
    by_block = {key: [own[key].weight for own in repaired if key in own] for key in repaired[0]}
    total = sum(weight.nbytes for block in by_block.values() for weight in block)
    lanes: list[PlainLane] = []

    def open_lane(device: torch.device, size: int) -> PlainLane:
        lanes.append(PlainLane(device, size))
        return lanes[0]

    return Uploads(by_block, dict.fromkeys(by_block, CPU), {CPU: round(share * total)}, open_lane), lanes


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_losses_are_the_same_with_any_placement(share: float) -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses(masks, tokens, repaired)
    uploads, lanes = uploads_of(repaired, share)
    with evaluator.uploading(uploads):
        assert torch.equal(evaluator.losses(masks, tokens, repaired), expected)
        copies = sum(event == "copied" for lane in lanes for event, _ in lane.events)
        streamed = len(repaired[0]) + len(repaired[1])
        assert copies == streamed if share == 0.0 else copies == 0 if share == 1.0 else 0 < copies < streamed
    assert torch.equal(evaluator.losses(masks, tokens, repaired), expected)


def test_losses_are_the_same_after_a_pass_that_failed_in_a_block() -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens(rows=3)
    expected = evaluator.losses(masks, tokens, repaired)
    failing = [True]

    def fail(*_: object) -> None:
        if failing and failing.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(fail)
    with evaluator.uploading(uploads_of(repaired, 0.0)[0]):
        actual = evaluator.losses(masks, tokens, repaired)
    handle.remove()
    assert evaluator.splitter.max_windows == 2
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
