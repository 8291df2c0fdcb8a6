"""Hidden states stay on the devices if these have room, move to the host if memory runs out, and change no number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.masks import keep_first
from helpers.medium import medium_model, medium_recipe, random_batches
from helpers.messages import says
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.estimate.memory import block_fit_bytes, observing_bytes, solving_bytes
from pgprune_cli.estimate.sizes import Sizes
from pgprune_cli.forward import states
from pgprune_cli.forward.block_text import BlockText
from pgprune_cli.forward.layerwise import LayerCalls, LayerwiseRun, start_layerwise
from pgprune_cli.forward.states import bytes_beside, have_room, rows_on, states_bytes
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.scores.metrics import score

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr("pgprune_cli.forward.shards.SHARDS", 1)


def text() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (windows, 12), generator=generator) for windows in (5, 3, 5)]


def layerwise(model: nn.Module) -> list[Tensor]:
    run = start_layerwise(PrunableModel.of(model), text())
    for index in range(len(run.layers)):
        run.advance(index)
    return run.hidden_states


def whole_blocks(model: nn.Module) -> list[Tensor]:
    mask = keep_first(model, [(1, 9)] * len(model.model.layers))
    blocks = repair(PrunableModel.of(model), mask, text(), "sublayer", 1e-2, epochs=1, last_layers=2).blocks
    return [tensor for block in blocks.values() for tensor in (block.weight, *block.inner.values())]


PASSES: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "layer-wise run": layerwise,
    "obs": lambda model: list(score(PrunableModel.of(model), "obs", text(), 0).values()),
    "repair of whole blocks": whole_blocks,
}


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", PASSES)
def test_numbers_are_the_same_wherever_the_states_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    on_host = PASSES[name](model)
    monkeypatch.setattr(states, "free_for_states", lambda model: 10**12)
    monkeypatch.setattr(LayerwiseRun, "to_host", None)  # they do not move
    assert same(PASSES[name](model), on_host)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("call", [0, 1, 7])
def test_states_move_to_the_host_once_before_any_batch_is_split(
    name: str, call: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama-gqa")
    on_host = PASSES[name](model)
    monkeypatch.setattr(states, "free_for_states", lambda model: 10**12)
    run, calls = LayerwiseRun._run, itertools.count()

    def fail(self: LayerwiseRun, *arguments: Any) -> Tensor:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *arguments)

    monkeypatch.setattr(LayerwiseRun, "_run", fail)
    moved = PASSES[name](model)
    assert same(moved, on_host)
    err = capfd.readouterr().err
    assert err.count("out of memory") == 1
    if (name, call) == ("layer-wise run", 1):
        says(err, "cpu", "out of memory", "host")


def test_a_window_that_fits_nowhere_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    monkeypatch.setattr(states, "free_for_states", lambda model: 10**12)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RunError, match="one window"):
        layerwise(model)
    handle.remove()


def test_the_text_of_a_block_moves_with_the_states_and_if_it_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    prunable = PrunableModel.of(tiny_model("llama-gqa"))
    run = start_layerwise(prunable, text(), storage="devices")
    moved: list[BlockText] = []
    monkeypatch.setattr(BlockText, "to_host", lambda self: moved.append(self))
    kept = BlockText([run], prunable.family, prunable.family.ffn)
    run.to_host()
    assert moved == [kept]

    run, allocate = start_layerwise(prunable, text(), storage="devices"), BlockText._allocate

    def fail(self: BlockText, runs: list[LayerwiseRun]) -> None:
        if not run.on_host:
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(self, runs)

    monkeypatch.setattr(BlockText, "_allocate", fail)
    assert BlockText([run], prunable.family, prunable.family.ffn).inputs.shape[0] == 13
    assert run.on_host


def test_states_have_room_beside_the_work_on_a_layer() -> None:
    assert have_room(60, 40, 100)
    assert not have_room(61, 40, 100)
    assert not have_room(0, 0, None)  # nobody knows what is free


@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 16}, {"hidden_size": 256}, {"intermediate_size": 1024}])
def test_the_work_on_a_layer_needs_no_more_than_is_left_for_it(shape: dict[str, int]) -> None:
    model = PrunableModel.of(medium_model(torch.bfloat16, **shape))
    sizes, tokens = Sizes(model, medium_recipe()), random_batches(windows=8, length=128)[0].numel()
    beside = bytes_beside(model, tokens)
    assert beside >= solving_bytes(sizes)
    assert beside >= observing_bytes(sizes, tokens) / 2
    assert beside + states_bytes(model, tokens, 3) >= block_fit_bytes(sizes, 512) / 2


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 2)])
@pytest.mark.parametrize("rows", [[], [4], [6, 0, 0, 3]])
def test_rows_are_those_of_indexing(shape: tuple[int, ...], rows: list[int]) -> None:
    kept, index = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(rows_on(CPU, kept, index), kept[index])
    assert rows_on(torch.device("meta"), kept, index).shape == kept[index].shape


def test_rows_get_to_a_gpu_through_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: what is asked for is recorded."""
    kept, empty, asked = torch.randn(5, 3), torch.empty, list[object]()

    def pinned(*sizes: int, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        asked.append(pin_memory)
        return empty(*sizes, dtype=dtype)

    def to(tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        asked.extend([device.type, non_blocking])
        return tensor

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(Tensor, "to", to)
    moved = rows_on(torch.device("cuda"), kept, torch.tensor([2, 0]))
    assert torch.equal(moved, kept[[2, 0]])
    assert asked == [True, "cuda", True]


def test_states_are_on_the_host_if_the_first_ones_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, failures = PrunableModel.of(tiny_model("llama-gqa")), iter([False, True])
    first_inputs = LayerCalls.first_inputs

    def fail_once(calls: LayerCalls, tokens: Tensor) -> Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return first_inputs(calls, tokens)

    expected = start_layerwise(model, text(), storage="host").hidden_states
    monkeypatch.setattr(LayerCalls, "first_inputs", fail_once)
    run = start_layerwise(model, text(), storage="devices")
    assert run.on_host
    assert same(run.hidden_states, expected)
    assert next(failures, None) is None
