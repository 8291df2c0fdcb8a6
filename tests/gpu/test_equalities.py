"""What holds on the CPU, on the chip: shrunk equals silenced, streams equal forward passes, parts equal wholes, runs resume.

Two devices compute the same function in another order: they are compared in float32 with TF32 off, within a tolerance.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.models import ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor, nn

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.forward import masked as masked
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import Fp8Linear, check_fp8, fp8_product, quantize_projections
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.layout import DECISION_MASKS, REPAIR_FILE
from pgprune_cli.search import loop as loops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LAYERS = ("search.policy=widths", "search.masks_per_step=4", "search.forward_passes=12", "repair.method=least-squares")
LAYERS += ("repair.windows=8", "calibration.windows=24")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=ARCHITECTURES)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """One tiny model, on the CPU and on the chip."""
    model = tiny_model(request.param)
    return model, copy.deepcopy(model).to("cuda")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def some_tokens(rows: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(0))


def keeps() -> list[ModelMask]:
    """About half of all units, one layer without attention, one without an FFN."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for empty in ((9, 9), (1, 2), (0, 3)):
        masks = [
            (torch.rand(4, generator=generator) < 0.5, torch.rand(24, generator=generator) < 0.5) for _ in range(4)
        ]
        some = enumerate(masks)
        found.append(tuple(LayerMask(a & (index != empty[0]), f & (index != empty[1])) for index, (a, f) in some))
    return found


def test_losses_are_those_of_the_cpu(pair) -> None:
    on_cpu, on_chip = (Evaluator(PrunableModel.of(model)).losses(keeps(), some_tokens()) for model in pair)
    torch.testing.assert_close(on_chip, on_cpu, rtol=1e-4, atol=0)
    assert len(set(on_chip.tolist())) == 3


def test_losses_of_int8_weights_are_those_of_the_cpu_and_never_wait(pair) -> None:
    for model in pair:
        quantize_projections(model, "int8")
    on_cpu, on_chip = (Evaluator(PrunableModel.of(model)) for model in pair)
    torch.testing.assert_close(
        on_chip.losses(keeps(), some_tokens()), on_cpu.losses(keeps(), some_tokens()), rtol=1e-4, atol=0
    )
    tokens = some_tokens().cuda()
    with waiting_is_an_error():
        on_chip._summed(keeps()[0], tokens, {})


def test_fp8_products_are_those_of_the_cpu_and_never_wait(pair) -> None:
    """Of the same inputs: one that is rounded the other way changes all that follows."""
    model = pair[1].bfloat16()
    try:
        check_fp8(torch.device("cuda"), torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    expected = Evaluator(PrunableModel.of(model)).losses(keeps(), some_tokens())
    quantize_projections(model, "fp8")
    seen = []

    def check(linear: Fp8Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        kept = (part.cpu() for part in linear.kept or (linear.values, linear.scale))
        found = fp8_product(inputs[0].cpu(), *kept)
        found = found if linear.bias is None else found + linear.bias.cpu()
        torch.testing.assert_close(output.cpu(), found, rtol=0.02, atol=0.02)
        seen.append(linear)

    linears = [each for each in model.modules() if isinstance(each, Fp8Linear)]
    handles = [linear.register_forward_hook(check) for linear in linears]
    torch.testing.assert_close(
        Evaluator(PrunableModel.of(model)).losses(keeps(), some_tokens()), expected, rtol=0.03, atol=0
    )
    assert len(seen) > len(linears)
    for handle in handles:
        handle.remove()
    tokens = some_tokens().cuda()
    with waiting_is_an_error():
        Evaluator(PrunableModel.of(model))._summed(keeps()[0], tokens, {})


def test_int8_weights_go_straight_to_the_chip_and_take_half_of_bfloat16s() -> None:
    """At the peak of loading, one projection exists in another form than int8."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(resolve("demo"), "bfloat16", "cuda", "int8")
    peak = torch.cuda.max_memory_allocated() - before
    weights = sum(parameter.nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in load_model(resolve("demo"), "bfloat16", "cpu").parameters())
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    assert weights < 0.6 * whole and peak < 0.9 * whole


def test_losses_are_the_same_twice_and_leave_no_trace(pair) -> None:
    _, model = pair
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluator = Evaluator(PrunableModel.of(model))
    assert torch.equal(evaluator.losses(keeps(), some_tokens()), evaluator.losses(keeps(), some_tokens()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stream_is_the_models_own_forward(pair) -> None:
    _, model = pair
    stream = start_layerwise(PrunableModel.of(model), [some_tokens()])
    for index in range(4):
        stream.advance(index)
    with torch.no_grad():
        expected = model.get_decoder()(input_ids=some_tokens().cuda(), use_cache=False).last_hidden_state
        found = model.model.norm(stream.hidden[0].cuda())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_never_waits_for_the_chip(pair) -> None:
    """Of the forward passes of a step; that their losses come back in the end is the one wait."""
    _, model = pair
    evaluator, tokens = Evaluator(PrunableModel.of(model)), some_tokens().cuda()
    evaluator.losses(keeps(), tokens)
    with waiting_is_an_error():
        for keep in keeps():
            evaluator._summed(keep, tokens, {})


def test_where_memory_really_runs_out_a_batch_goes_through_in_parts() -> None:
    """Of the chip's memory, this process may take what half of the batch needs."""
    model = load_model(resolve("demo"), "float32", "cuda")
    evaluator = Evaluator(PrunableModel.of(model))
    space = evaluator.shape.space(("attention", "ffn"))
    keep = evaluator.shape.keep(space, torch.arange(space.n) % 2 > 0)
    tokens = torch.randint(200, (512, 128), generator=torch.Generator().manual_seed(0))
    expected = evaluator.losses([keep], tokens)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Evaluator(PrunableModel.of(model)).losses([keep], tokens[:256])
    half, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.1 * half / total)
    try:
        torch.testing.assert_close(evaluator.losses([keep], tokens), expected, rtol=1e-5, atol=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert evaluator.splitter.most and evaluator.splitter.most <= 256


def test_no_memory_for_one_window_is_an_error(monkeypatch) -> None:
    def fails(*_: object) -> Tensor:
        return torch.empty(1 << 50, device="cuda")

    monkeypatch.setattr(masked, "summed_loss", fails)
    with pytest.raises(RunError, match="out of memory with one window"):
        Evaluator(tiny_model("llama-gqa").to("cuda")).losses(keeps(), some_tokens())


def test_a_search_on_the_chip_is_the_same_twice(small, tmp_path) -> None:
    recipe: Recipe = small(*LAYERS, "device=cuda")
    first, second = (search(recipe, tmp_path / name) for name in ("first", "second"))
    for name in (DECISION_MASKS, REPAIR_FILE):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert first.heldout_loss == second.heldout_loss


def test_a_search_on_the_chip_resumes_bit_for_bit(small, tmp_path, monkeypatch) -> None:
    original = loops._one_step

    def stopped_after_two(problem, loop):
        row = original(problem, loop)
        if loop.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    recipe: Recipe = small(*LAYERS, "device=cuda")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    search(recipe, whole)
    monkeypatch.setattr(loops, "_one_step", stopped_after_two)
    with pytest.raises(loops.Interrupted):
        search(recipe, cut)
    monkeypatch.setattr(loops, "_one_step", original)
    search(recipe, cut)
    assert latest_checkpoint(cut).state.losses.tolist() == latest_checkpoint(whole).state.losses.tolist()
    assert (cut / DECISION_MASKS).read_bytes() == (whole / DECISION_MASKS).read_bytes()


def test_a_search_on_the_chip_loses_what_one_on_the_cpu_does(small, tmp_path) -> None:
    on_cpu, on_chip = (search(small(*LAYERS, f"device={device}"), tmp_path / device) for device in ("cpu", "cuda"))
    assert on_chip.heldout_loss == pytest.approx(on_cpu.heldout_loss, rel=0.02)
    assert on_chip.sparsity == pytest.approx(on_cpu.sparsity, abs=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_spread_over_two_chips_loses_what_it_did() -> None:
    alone, halves = (Evaluator(load_model(resolve("demo"), "float32", device)) for device in ("cuda", "cuda:0,cuda:1"))
    space = alone.shape.space(("attention", "ffn"))
    keep = alone.shape.keep(space, torch.arange(space.n) % 3 > 0)
    tokens = torch.arange(48).view(2, 24)
    torch.testing.assert_close(halves.losses([keep], tokens), alone.losses([keep], tokens), rtol=1e-6, atol=0)
