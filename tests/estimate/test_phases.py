"""Bytes and operations of the parts of a search, against those of operators that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.masks import keep_first
from helpers.medium import VOCABULARY, medium_model, medium_recipe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgprune_cli.estimate.passes import Setup, dense_head, layers, masks
from pgprune_cli.estimate.phases import block_fits, moments, phases
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.estimate.traffic import UPDATE
from pgprune_cli.estimate.work import Work
from pgprune_cli.forward.divergence import Divergence
from pgprune_cli.forward.masked import Evaluator, last_hidden_states
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.training import CHECKS, set_aside

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu"}


class Moved(TorchDispatchMode):
    """Inside the `with`, counts operators that are no views, and the bytes that all but products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode, an operator made of others arrives as one
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        read, written = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        known = {tensor.untyped_storage().data_ptr() for tensor in read}
        if written and not func._schema.is_mutable and all(t.untyped_storage().data_ptr() in known for t in written):
            return result  # a view
        self.operations += 1
        if func._schema.name not in PRODUCTS:
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in [*read, *written])
        return result


def moved(run: Callable[[], object]) -> Moved:
    with Moved() as seen:
        run()
    return seen


def text(length: int = 128) -> Tensor:
    return torch.randint(VOCABULARY, (8, length), generator=torch.Generator().manual_seed(0))


def of(model: nn.Module, *overrides: str) -> Sizes:
    return Sizes(PrunableModel.of(model), medium_recipe(*overrides))


@pytest.mark.usefixtures("kernel_for_groups")
@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 768}, {"num_key_value_heads": 8}, {"hidden_size": 128}])
def test_what_the_dense_layers_move_and_launch(shape: dict[str, int]) -> None:
    model, tokens = medium_model(torch.bfloat16, **shape), text()
    seen = moved(lambda: last_hidden_states(model, tokens))
    expected = layers(of(model), [tokens])
    assert expected.traffic == pytest.approx(seen.bytes, rel=0.15)  # the final norm is counted nowhere
    assert expected.operations == pytest.approx(seen.operations, rel=0.25)


@pytest.mark.usefixtures("kernel_for_groups")
@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 768}, {"vocab_size": 2000}, {"num_hidden_layers": 6}])
def test_what_a_mask_moves_and_launches(shape: dict[str, int]) -> None:
    model, tokens = medium_model(torch.bfloat16, **shape), text()
    divergence = Divergence(Evaluator(PrunableModel.of(model)))
    count, half = len(model.model.layers), model.config.intermediate_size // 2
    mask, dense = keep_first(model, [(1, half)] * count), divergence.dense_states(tokens)
    seen = moved(lambda: divergence.values([mask], tokens, [{}], dense))
    sizes = of(model, "search.objective=kl", "search.policy=units")
    own, head = masks(sizes, tokens, 1, Setup()), dense_head(sizes, tokens)
    assert own.traffic + head.traffic == pytest.approx(seen.bytes, rel=0.2)
    assert own.operations == pytest.approx(seen.operations, rel=0.25)


CLOSED = ("repair.method=least-squares",)


def work(setup: Setup, phase: str, *overrides: str) -> Work:
    """Return a phase of the medium model's search as one."""
    batches = [text(), text()]
    sizes = of(medium_model(torch.bfloat16), "search.objective=kl", "repair.windows=16", *overrides)
    parts = phases(sizes, Texts(batches, batches, batches, batches[0], batches[1]), setup)[phase]
    return sum(parts[1:], parts[0])


@pytest.mark.parametrize("phase", ["scores", "width table", "repair"])
def test_hidden_states_on_the_host_are_copied_in_every_pass(phase: str) -> None:
    state = 2 * text().numel() * 64 * 2
    away, here = (work(Setup(states=room), phase, "repair.method=least-squares").awaited for room in (0, 1e9))
    assert away - here == (4 if phase == "repair" else 2) * 3 * state


def test_a_fit_copies_what_its_block_reads_and_writes_in_every_epoch() -> None:
    state = 2 * text().numel() * 64 * 2
    away, here = (work(Setup(states=room), "repair", "repair.epochs=3") for room in (0, 1e9))
    runs = 3 + 2 + (1 + CHECKS) * set_aside(16) / 16
    assert away.awaited - here.awaited == 4 * 3 * state + 6 * 2 * state
    assert away.copied - here.copied == pytest.approx(6 * 2 * state * runs)
    assert away.staged - here.staged == away.copied - here.copied


def test_the_table_is_copied_from_pageable_memory_to_where_it_is_kept() -> None:
    none, half, whole = (work(Setup(table=part), "width table") for part in (0.0, 0.5, 1.0))
    table = whole.awaited - none.awaited
    assert table == none.checked > 0  # all of it has a checksum
    assert half.awaited - none.awaited == pytest.approx(table / 2)
    assert none.copied == whole.copied


def test_int8_weights_are_unpacked_in_every_pass() -> None:
    plain, model, tokens = of(medium_model(torch.bfloat16)), medium_model(torch.bfloat16), text()
    rounded = of(model, "weight_format=int8")
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 2)
    repaired = 3 * (64 * 64 + 64 * 192)  # they come from the table, which is not rounded
    extra = layers(rounded, [tokens] * 2).traffic - layers(plain, [tokens] * 2).traffic
    assert extra == pytest.approx(2 * 3 * weights)
    extra = masks(rounded, tokens, 2, Setup()).traffic - masks(plain, tokens, 2, Setup()).traffic
    assert extra == pytest.approx(2 * 3 * 0.5 * (weights - repaired), rel=0.01)


def test_weights_of_the_table_that_the_device_has_no_room_for_are_copied_by_every_mask() -> None:
    parts = [work(Setup(table=part), "steps") for part in (0.5, 1.0)]
    own, none = (part.copied for part in parts)
    assert [part.staged for part in parts] == [own, none]
    passes = 320 + 9 * 1
    outputs = 3 * (64 * 64 + 64 * 192) * 2 * 0.5
    assert none == 0
    assert own == pytest.approx(0.5 * outputs * passes, rel=0.05)


def test_gpus_divide_masks_moments_equations_and_predictions_but_not_fits() -> None:
    one, eight = Setup(), Setup(processes=8)
    sizes, once = of(medium_model(torch.bfloat16)), layers(of(medium_model(torch.bfloat16)), [text()])
    assert work(eight, "steps").weights < 0.3 * work(one, "steps").weights
    assert work(one, "repair") == work(eight, "repair") + once  # the dense model runs on one of two batches
    assert work(one, "repair", *CLOSED) == work(eight, "repair", *CLOSED)
    for phase in ("scores", "width table"):
        assert work(eight, phase).flops[torch.float32] < work(one, phase).flops[torch.float32]
        saved = work(one, phase).flops[torch.bfloat16] - work(eight, phase).flops[torch.bfloat16]
        divided = 2 * moments(sizes, [text(), text()]).flops[torch.bfloat16] // 3
        assert saved == divided + once.flops[torch.bfloat16]  # of two batches for the curvature


def test_cpus_divide_passes_and_moments_by_shard() -> None:
    one, two, eight = (Setup(shards=2, processes=processes) for processes in (1, 2, 8))
    for phase in ("scores", "width table"):
        work_of_one, work_of_two, work_of_eight = (work(setup, phase).flops for setup in (one, two, eight))
        assert work_of_one == work(Setup(), phase).flops
        assert work_of_two[torch.bfloat16] == work_of_eight[torch.bfloat16]  # there are no more shards
        sizes, batches = of(medium_model(torch.bfloat16)), [text(), text()]
        divided = 2 * layers(sizes, batches).flops[torch.bfloat16] + moments(sizes, batches).flops[torch.bfloat16]
        assert work_of_one[torch.bfloat16] - work_of_two[torch.bfloat16] == divided // 2  # also for the curvature


def test_cpus_divide_all_of_a_fit_but_its_updates() -> None:
    sizes, batches = of(medium_model(torch.bfloat16), "repair.epochs=4"), [text()] * 4
    one, two, eight = (block_fits(sizes, batches, Setup(shards=2, processes=processes)) for processes in (1, 2, 8))
    assert two == eight
    assert one.flops.total() == pytest.approx(2 * two.flops.total(), rel=0.01)
    updates = 4 * 30 / 8 * len(sizes.blocks)  # of 8 windows of 128 tokens, one of 16 windows is set aside
    assert 2 * two.operations - one.operations == pytest.approx(UPDATE * updates)
    assert 2 * two.traffic - one.traffic > 40 * sum(block.nbytes // 2 * block.keep_fraction for block in sizes.blocks)
    whole = block_fits(sizes, batches, Setup())
    assert whole.operations < one.operations  # each shard is run apart


def test_equations_that_the_host_solves_are_no_work_of_the_device() -> None:
    here, host = (work(Setup(solves=solves), "scores") for solves in (True, False))
    assert host.solved == pytest.approx(here.flops.total() - host.flops.total())
    assert host.solved > 0 == here.solved


def test_a_fit_moves_the_state_of_adamw_in_every_step() -> None:
    sizes, batches = of(medium_model(torch.bfloat16), "repair.epochs=4"), [text(), text()]
    few = of(medium_model(torch.bfloat16), "repair.epochs=2")
    added = block_fits(sizes, batches, Setup()).traffic - block_fits(few, batches, Setup()).traffic
    parameters = sum(block.nbytes // 2 * block.keep_fraction for block in sizes.blocks)
    steps = 2 * 15 / 8  # of 8 windows of 128 tokens, one of 16 windows is set aside
    assert added > 40 * parameters * steps
