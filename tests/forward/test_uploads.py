"""Repaired weights reach their blocks whole and in time, wherever they are placed."""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from helpers.lanes import PlainLane
from helpers.masks import MODEL_MASKS, random_repair, random_tokens
from helpers.messages import says
from helpers.models import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward.divergence import Divergence
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


def test_copy_that_fails_is_an_error_where_the_weight_is_needed(lane: PlainLane, worker, monkeypatch) -> None:
    def fail(slot: int, weight: Tensor) -> None:
        raise OSError("the file is gone")

    monkeypatch.setattr(lane, "copy", fail)
    ring = Ring(lane, weights(2), worker)
    with pytest.raises(OSError, match="the file is gone"):
        ring.take(0)
    ring.close()


def test_ring_is_closed_whole_when_a_copy_failed(lane: PlainLane, worker, monkeypatch) -> None:
    copy = lane.copy

    def fail_second(slot: int, weight: Tensor) -> None:
        if slot == 1:
            raise OSError("the file is gone")
        copy(slot, weight)

    monkeypatch.setattr(lane, "copy", fail_second)
    ring = Ring(lane, weights(SLOTS), worker)
    ring.take(0)
    ring.close()
    assert lane.events[-1] == ("used", 0)  # the block that took it has failed
    assert ("copied", SLOTS - 1) in lane.events[:-1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, which it does not in a process that a shell has put in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ring_waits_for_a_copy_when_ctrl_c_interrupts_the_wait_for_it(lane: PlainLane, worker, monkeypatch) -> None:
    copy, waiting, done = lane.copy, threading.Event(), []

    def interrupt(slot: int, weight: Tensor) -> None:
        if not slot:
            waiting.wait()
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
        copy(slot, weight)
        done.append(slot)

    monkeypatch.setattr(lane, "copy", interrupt)
    ring = Ring(lane, weights(1), worker)
    with pytest.raises(KeyboardInterrupt):
        waiting.set()
        ring.take(0)
    assert not done
    ring.close()
    assert done == [0]


# --- forward passes


def problem() -> tuple[nn.Module, list[ModelMask], list[RepairedBlocks]]:
    model = tiny_model("llama-biased")
    masks = [MODEL_MASKS[name](model) for name in ("random", "an empty layer")]
    return model, masks, [random_repair(model, mask, bias=True) for mask in masks]


def uploads_of(
    repaired: list[RepairedBlocks], share: float, make: Callable[[torch.device, int], PlainLane] = PlainLane
) -> tuple[Uploads, list[PlainLane]]:
    """Return uploads of the weights of both repairs, of which a share has room on the device, and their lanes."""
    by_block = {key: [own[key].weight for own in repaired if key in own] for key in repaired[0]}
    total = sum(weight.nbytes for block in by_block.values() for weight in block)
    lanes: list[PlainLane] = []

    def new_lane(device: torch.device, size: int) -> PlainLane:
        lanes.append(make(device, size))
        return lanes[-1]

    return Uploads(by_block, dict.fromkeys(by_block, CPU), {CPU: round(share * total)}, new_lane), lanes


def copies_of(lanes: list[PlainLane]) -> int:
    return sum(event == "copied" for lane in lanes for event, _ in lane.events)


@contextmanager
def running_out(module: nn.Module, times: int) -> Iterator[None]:
    """Inside the `with`, the first calls of a module run out of memory."""
    failing = [True] * times

    def fail(*_: object) -> None:
        if failing:
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
    assert not failing


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_losses_are_the_same_with_any_placement(share: float) -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses(masks, tokens, repaired)
    uploads, lanes = uploads_of(repaired, share)
    with evaluator.uploading(uploads):
        assert torch.equal(evaluator.losses(masks, tokens, repaired), expected)
        copies, streamed = copies_of(lanes), len(repaired[0]) + len(repaired[1])
        assert copies == streamed if share == 0.0 else copies == 0 if share == 1.0 else 0 < copies < streamed
    assert torch.equal(evaluator.losses(masks, tokens, repaired), expected)


def test_losses_are_the_same_after_a_pass_that_failed_in_a_block() -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens(rows=3)
    expected = evaluator.losses(masks, tokens, repaired)
    with evaluator.uploading(uploads_of(repaired, 0.0)[0]), running_out(model.model.layers[2].mlp.down_proj, 1):
        actual = evaluator.losses(masks, tokens, repaired)
    assert evaluator.splitter.max_windows == 2
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("module", ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj", "lm_head"])
def test_threads_of_uploads_end_whatever_stops_a_step(module: str, error: type[BaseException]) -> None:
    """If memory runs out for good, a RunError stops it."""
    model, masks, repaired = problem()
    evaluator, tokens, threads = Evaluator(PrunableModel.of(model)), random_tokens(), threading.active_count()
    expected = evaluator.losses(masks, tokens, repaired)
    uploads, lanes = uploads_of(repaired, 0.0)

    def fail(*_: object) -> None:
        assert threading.active_count() == threads + 1
        raise error("stopped")

    handle = model.get_submodule(module).register_forward_pre_hook(fail)
    with pytest.raises((error, RunError)), evaluator.uploading(uploads):
        evaluator.losses(masks, tokens, repaired)
    handle.remove()
    assert threading.active_count() == threads
    copied, used = ([slot for event, slot in lanes[0].events if event == name] for name in ("arrived", "used"))
    assert sorted(copied) == sorted(used)  # no slot is left in use
    torch.testing.assert_close(evaluator.losses(masks, tokens, repaired), expected, rtol=1e-6, atol=0)


# --- memory that runs out


def no_lane(*_: object) -> PlainLane:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_losses_are_the_same_without_memory_for_a_lane(share: float, capsys) -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses(masks, tokens, repaired)
    with evaluator.uploading(uploads_of(repaired, share, no_lane)[0]):
        assert torch.equal(evaluator.losses(masks, tokens, repaired), expected)
    err = capsys.readouterr().err
    assert err.count("no memory") == 1
    if not share:
        says(err, "cpu", "no memory", "width table")


def test_other_errors_of_a_lane_are_passed_on() -> None:
    def fail(*_: object) -> PlainLane:
        raise RuntimeError("CUDA error: invalid device ordinal")

    with pytest.raises(RuntimeError, match="invalid device"):
        uploads_of(problem()[2], 0.0, fail)


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_everything_is_uploaded_when_memory_runs_out_while_weights_are_placed(share: float, monkeypatch) -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses(masks, tokens, repaired)
    placed: list[Tensor] = []

    def fails_third(weight: Tensor, device: torch.device) -> Tensor:
        if len(placed) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        placed.append(weight)
        return weight

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", fails_third)
        uploads, lanes = uploads_of(repaired, share)
    with evaluator.uploading(uploads):
        assert torch.equal(evaluator.losses(masks, tokens, repaired), expected)
    assert len(placed) == 2 and len(lanes) == 1
    assert copies_of(lanes) == len(repaired[0]) + len(repaired[1])


@pytest.mark.parametrize("objective", ["loss", "divergence"])
@pytest.mark.parametrize("module", ["model.layers.2.mlp.down_proj", "lm_head"])
def test_kept_weights_are_freed_once_before_a_batch_is_split(module: str, objective: str, capsys) -> None:
    model, masks, repaired = problem()
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens(rows=3)
    divergence = Divergence(evaluator)
    dense = divergence.dense_states(tokens)

    def values() -> Tensor:
        if objective == "loss":
            return evaluator.losses(masks, tokens, repaired)
        return divergence.values(masks, tokens, repaired, dense).objective

    expected = values()
    uploads, lanes = uploads_of(repaired, 1.0)
    with evaluator.uploading(uploads):
        assert uploads.keeps_weights
        with running_out(model.get_submodule(module), 1):
            assert torch.equal(values(), expected)
        assert not uploads.keeps_weights and evaluator.splitter.max_windows is None
        assert torch.equal(values(), expected)
        assert len(lanes) == 1 and copies_of(lanes) >= len(repaired[0]) + len(repaired[1])
        with running_out(model.model.layers[2].mlp.down_proj, 1):
            torch.testing.assert_close(values(), expected, rtol=1e-5, atol=1e-7)
        assert evaluator.splitter.max_windows == 2
    err = capsys.readouterr().err
    assert err.count("out of memory") == 1
    if (module, objective) == ("lm_head", "loss"):
        says(err, "cpu", "out of memory", "width table")


def test_weights_live_as_long_as_their_uploads() -> None:
    """Another weight in the place of a freed one would be taken for it."""
    weight, key, elsewhere = torch.ones(2, 2), (0, "ffn"), torch.device("meta")
    alive = weakref.ref(weight)
    uploads = Uploads({key: [weight]}, {key: elsewhere}, {elsewhere: 1000}, PlainLane)
    del weight
    assert uploads.keeps_weights and alive() is not None
    uploads.close()
