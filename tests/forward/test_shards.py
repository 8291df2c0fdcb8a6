"""Shards of a text: every process gets the same sums bit for bit, and together they have every window once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from helpers.fits import windows
from helpers.masks import draw
from helpers.models import EXPERT_ARCHITECTURES, tiny_model
from helpers.processes import run_together
from torch import Tensor

from pgprune_cli.distributed import Ranks
from pgprune_cli.forward.shards import Shards, shard_batches, start_sharded
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair import sublayer, training
from pgprune_cli.repair.least_squares import Repaired, repair
from pgprune_cli.scores.metrics import score

WORLDS = [2, 3, 4, 5]
COUNTS = [((2, 1), 11), (4, 13), (3, 9), ((2, 1), 6)]


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sums_are_the_same_bits_for_any_number_of_processes(count: int, world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [[torch.randn(50, generator=generator), torch.randn((), generator=generator)] for _ in range(count)]

    def total(ranks: Ranks) -> list[Tensor]:
        shards = Shards((3,) * count, ranks)
        return shards.sum([tensor.clone() for tensor in values[shard]] for shard in shards.own)

    alone = total(Ranks())
    assert all(bits(own) == bits(alone) for own in run_together(world, total))
    torch.testing.assert_close(alone[0], sum(tensors[0] for tensors in values))


@pytest.mark.parametrize("world", [1, *WORLDS])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_owners_have_every_window_once(count: int, world: int) -> None:
    text = [torch.full((size % 3 + 1, 5), size) for size in range(count)]
    total = sum(map(len, text))
    model, found = PrunableModel.of(tiny_model("llama-gqa")), []
    for rank in range(1 << (world.bit_length() - 1)):
        run = start_sharded(model, text, Ranks(rank, world))
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(1))[: total // 2 + 1]
        own = [run.shards.rows(shard, chosen) for shard in run.shards.own]
        if rank < len(run.shards.windows):
            start = sum(map(len, text[: run.batches.start]))
            found += [int(row) + start for rows in own for row in rows]
        assert sum(map(len, run.hidden_states)) == sum(run.shards.windows[shard] for shard in run.shards.own)
    assert sorted(found) == sorted(chosen.tolist())


def test_a_gpu_has_one_shard() -> None:
    assert shard_batches(9, torch.device("cuda")) == [range(9)]
    assert shard_batches(9, torch.device("cpu")) == [range(4), range(4, 9)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2", *EXPERT_ARCHITECTURES[:1]])
def test_processes_that_share_a_repair_get_the_weights_of_one(architecture: str, world: int, monkeypatch) -> None:
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 160)
    monkeypatch.setattr(sublayer, "LEARNING_RATE", 1e-2)
    model = tiny_model(architecture)
    mask = draw(model, [((2, 1), 12)] * 4 if architecture in EXPERT_ARCHITECTURES else COUNTS, seed=1)

    def repaired(ranks: Ranks) -> Repaired:
        own = PrunableModel.of(copy.deepcopy(model))
        return repair(own, mask, windows(), "sublayer", 1e-3, epochs=2, last_layers=2, reselect=True, ranks=ranks)

    alone = repaired(Ranks())
    if architecture not in EXPERT_ARCHITECTURES:
        assert any(block.inner for block in alone.blocks.values())  # the fits have found something
    for own in run_together(world, repaired):
        assert list(own.blocks) == list(alone.blocks)
        assert all(bits(block.tensors) == bits(alone.blocks[key].tensors) for key, block in own.blocks.items())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("metric", ["obs", "wanda-sp", "flap"])
@pytest.mark.parametrize("architecture", ["qwen3", *EXPERT_ARCHITECTURES[:1]])
def test_processes_that_share_the_scores_get_those_of_one(architecture: str, metric: str, world: int) -> None:
    model = tiny_model(architecture)

    def scores(ranks: Ranks) -> dict[str, Tensor]:
        own = PrunableModel.of(copy.deepcopy(model))
        return score(own, metric, windows(), 0, ranks.share(own.shape.layers), ranks=ranks)

    alone = scores(Ranks())
    shared = {name: values for own in run_together(world, scores) for name, values in own.items()}
    assert sorted(shared) == sorted(alone)
    assert all(torch.equal(values, alone[name]) for name, values in shared.items())


def test_processes_continue_alike_when_memory_runs_out_on_one_of_them(monkeypatch) -> None:
    """It splits its batches, and the others get what it computed."""
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 160)
    model = tiny_model("llama-gqa")
    mask = draw(model, COUNTS, seed=1)

    def fail(_: object, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def repaired(ranks: Ranks) -> Repaired:
        own = copy.deepcopy(model)
        if ranks.rank == 1:
            own.model.layers[0].mlp.act_fn.register_forward_pre_hook(fail)
        return repair(PrunableModel.of(own), mask, windows(), "sublayer", 1e-3, epochs=1, ranks=ranks)

    alone = repaired(Ranks())
    first, second = run_together(2, repaired)
    for key, block in alone.blocks.items():
        assert bits(first.blocks[key].tensors) == bits(second.blocks[key].tensors)
        for own, whole in zip(first.blocks[key].tensors, block.tensors, strict=True):
            torch.testing.assert_close(own, whole, rtol=1e-2, atol=1e-3)


def test_processes_whose_repairs_differ_are_refused() -> None:
    """For example by a machine of another kind."""
    model, mask = tiny_model("llama-gqa"), draw(tiny_model("llama-gqa"), COUNTS, seed=1)

    def repaired(ranks: Ranks) -> Repaired:
        own = PrunableModel.of(copy.deepcopy(model))
        return repair(own, mask, windows(), "least-squares", 1e-3 if ranks.rank else 2e-3, ranks=ranks)

    with pytest.raises(Exception, match="are not running the same search"):
        run_together(2, repaired)
