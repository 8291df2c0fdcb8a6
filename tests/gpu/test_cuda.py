"""A GPU computes what the CPU computes, never makes the host wait inside a step, and resumes a search bit for bit.

The two devices sum in different orders: they are compared in float32 without TF32, within a tolerance.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from helpers.fp8 import rounded_product
from helpers.gpu import waiting_is_an_error
from helpers.masks import MODEL_MASKS, random_repair, random_tokens
from helpers.models import ARCHITECTURES, tiny_model
from helpers.units import group_units
from torch import Tensor

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.forward import masked
from pgprune_cli.forward.divergence import Divergence
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.forward.uploads import CudaLane, Uploads
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_prunable
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import Fp8Linear, check_fp8, quantize_projections
from pgprune_cli.model.source import resolve
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.layout import DECISION_MASKS, REPAIR_FILE
from pgprune_cli.search import loop as search_loop
from pgprune_cli.search import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

WIDTH_SEARCH = (
    "search.policy=widths",
    "search.masks_per_step=4",
    "search.forward_passes=12",
    "repair.method=least-squares",
    "repair.windows=8",
    "calibration.windows=24",
)


def some_masks(model: PrunableModel) -> list[ModelMask]:
    return [MODEL_MASKS[name](model.module) for name in ("random", "empty attention", "empty ffn")]


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=ARCHITECTURES)
def on_both(request) -> tuple[PrunableModel, PrunableModel]:
    """The same tiny model on the CPU and on the GPU."""
    module = tiny_model(request.param)
    return PrunableModel.of(module), PrunableModel.of(copy.deepcopy(module).to("cuda"))


def test_losses_on_the_gpu_equal_those_on_the_cpu(on_both) -> None:
    masks = some_masks(on_both[0])
    on_cpu, on_gpu = (Evaluator(model).losses(masks, random_tokens()) for model in on_both)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=0)
    assert len(set(on_gpu.tolist())) == len(masks)


def test_divergence_on_the_gpu_equals_that_on_the_cpu_without_waiting(on_both) -> None:
    masks, tokens = some_masks(on_both[0]), random_tokens()
    on_cpu, on_gpu = (Divergence(Evaluator(model), 1.0) for model in on_both)
    expected, actual = (
        own.values(masks, tokens, [{}] * len(masks), own.dense_states(tokens)) for own in (on_cpu, on_gpu)
    )
    torch.testing.assert_close(actual.objective, expected.objective, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=0)
    on_device, dense = tokens.cuda(), on_gpu.dense_states(tokens)
    with waiting_is_an_error():
        states, _ = on_gpu._run(masks[0], on_device, {}, dense)
        on_gpu._against_dense([states], dense.predicting, on_device[:, 1:].flatten())


def test_int8_losses_on_the_gpu_equal_those_on_the_cpu_without_waiting(on_both) -> None:
    masks = some_masks(on_both[0])
    for model in on_both:
        quantize_projections(model.module, "int8")
    on_cpu, on_gpu = map(Evaluator, on_both)
    expected = on_cpu.losses(masks, random_tokens())
    torch.testing.assert_close(on_gpu.losses(masks, random_tokens()), expected, rtol=1e-4, atol=0)
    tokens = random_tokens().cuda()
    with waiting_is_an_error():
        on_gpu._summed(masks[0], tokens, {})


def test_fp8_products_on_the_gpu_equal_those_on_the_cpu_without_waiting(on_both) -> None:
    """Each product is checked on the GPU's own inputs: one input rounded differently changes everything after it.

    The reference is computed in float32: not every PyTorch multiplies fp8 on the CPU.
    """
    masks = some_masks(on_both[0])
    module = on_both[1].module.bfloat16()
    try:
        check_fp8(torch.device("cuda"), torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    expected = Evaluator(PrunableModel.of(module)).losses(masks, random_tokens())
    quantize_projections(module, "fp8")
    evaluator = Evaluator(PrunableModel.of(module))
    checked = []

    def check(linear: Fp8Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        values, scale = linear.kept or (linear.values, linear.scale)
        product = rounded_product(inputs[0], values, scale)
        product = product if linear.bias is None else product + linear.bias
        torch.testing.assert_close(output.float(), product, rtol=0.02, atol=0.02)
        checked.append(linear)

    linears = [submodule for submodule in module.modules() if isinstance(submodule, Fp8Linear)]
    handles = [linear.register_forward_hook(check) for linear in linears]
    torch.testing.assert_close(evaluator.losses(masks, random_tokens()), expected, rtol=0.03, atol=0)
    assert len(checked) > len(linears)
    for handle in handles:
        handle.remove()
    tokens = random_tokens().cuda()
    with waiting_is_an_error():
        evaluator._summed(masks[0], tokens, {})


def test_loading_int8_weights_never_holds_the_full_model_on_the_gpu() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module = load_prunable(resolve("demo"), "bfloat16", "cuda", "int8").module
    peak = torch.cuda.max_memory_allocated() - before
    int8_bytes = sum(parameter.nbytes for parameter in module.parameters())
    full = load_prunable(resolve("demo"), "bfloat16", "cpu").module
    full_bytes = sum(parameter.nbytes for parameter in full.parameters())
    assert all(parameter.device.type == "cuda" for parameter in module.parameters())
    assert int8_bytes < 0.6 * full_bytes and peak < 0.9 * full_bytes


def test_losses_are_identical_twice_and_leave_the_weights_unchanged(on_both) -> None:
    masks = some_masks(on_both[0])
    _, model = on_both
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    evaluator = Evaluator(model)
    assert torch.equal(evaluator.losses(masks, random_tokens()), evaluator.losses(masks, random_tokens()))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_a_layerwise_run_equals_the_models_forward_pass(on_both) -> None:
    _, model = on_both
    run = start_layerwise(model, [random_tokens()])
    for index in range(model.shape.layers):
        run.advance(index)
    with torch.no_grad():
        expected = model.decoder(input_ids=random_tokens().cuda(), use_cache=False).last_hidden_state
        actual = model.final_norm(run.hidden_states[0].cuda())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODEL_MASKS)
def test_a_forward_pass_never_makes_the_host_wait(on_both, name) -> None:
    """The host waits only once a step, when it reads the losses."""
    _, model = on_both
    evaluator, tokens = Evaluator(model), random_tokens().cuda()
    model_mask = MODEL_MASKS[name](model.module)
    evaluator.losses([model_mask], tokens)  # the first pass sets up libraries
    with waiting_is_an_error():
        evaluator._summed(model_mask, tokens, {})


def test_a_batch_is_split_when_the_gpu_really_runs_out_of_memory() -> None:
    """The process may use only as much of the GPU's memory as half of the batch needs."""
    model = load_prunable(resolve("demo"), "float32", "cuda")
    evaluator = Evaluator(model)
    space, units = group_units(model.shape)
    model_mask = model.shape.model_mask(space, torch.arange(space.n) % 2 > 0, units)
    tokens = torch.randint(200, (512, 128), generator=torch.Generator().manual_seed(0))
    expected = evaluator.losses([model_mask], tokens)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Evaluator(model).losses([model_mask], tokens[:256])
    half, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.1 * half / total)
    try:
        torch.testing.assert_close(evaluator.losses([model_mask], tokens), expected, rtol=1e-5, atol=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert evaluator.splitter.max_windows is not None and evaluator.splitter.max_windows <= 256


def test_a_window_that_does_not_fit_is_refused(monkeypatch) -> None:
    def allocate_too_much(*_: object) -> Tensor:
        return torch.empty(1 << 50, device="cuda")

    monkeypatch.setattr(masked, "summed_loss", allocate_too_much)
    evaluator = Evaluator(PrunableModel.of(tiny_model("llama-gqa").to("cuda")))
    with pytest.raises(RunError, match=r"calibration\.seqlen"):
        evaluator.losses(some_masks(evaluator.model), random_tokens())


def uploads_to(model: PrunableModel, repaired: list[RepairedBlocks], share: float) -> Uploads:
    """Return uploads of repaired weights, of which a share has room on the GPU."""
    keys = sorted({key for own in repaired for key in own})
    weights = {key: [own[key].weight for own in repaired if key in own] for key in keys}
    room = round(share * sum(weight.nbytes for block in weights.values() for weight in block))
    return Uploads(weights, dict.fromkeys(keys, model.device), {model.device: room}, CudaLane)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_uploaded_weights_give_the_losses_of_weights_on_the_gpu_without_waiting(on_both, share: float) -> None:
    """Placed on the GPU, or copied while earlier blocks compute: many passes in a row, so that slots are reused."""
    model = on_both[1]
    masks = some_masks(model)
    repaired = [random_repair(on_both[0].module, mask, bias=True) for mask in masks]
    evaluator, tokens = Evaluator(model), random_tokens().cuda()
    expected = evaluator.losses(masks * 10, tokens, repaired * 10)
    with evaluator.uploading(uploads_to(model, repaired, share)):
        with waiting_is_an_error():
            evaluator._summed(masks[0], tokens, repaired[0])
        assert torch.equal(evaluator.losses(masks * 10, tokens, repaired * 10), expected)


def test_kept_weights_are_freed_and_uploaded_after_memory_has_run_out(on_both) -> None:
    model, failing = on_both[1], [True]
    masks, tokens = some_masks(model), random_tokens()
    repaired = [random_repair(on_both[0].module, mask, bias=True) for mask in masks]
    divergence = Divergence(Evaluator(model))
    dense = divergence.dense_states(tokens)
    expected = divergence.values(masks, tokens, repaired, dense).objective

    def fail(*_: object) -> None:
        if failing and failing.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.layers[2].register_forward_pre_hook(fail)
    uploads = uploads_to(model, repaired, 1.0)
    with divergence.evaluator.uploading(uploads):
        for _ in range(3):
            assert torch.equal(divergence.values(masks, tokens, repaired, dense).objective, expected)
        assert not uploads.keeps_weights and divergence.evaluator.splitter.max_windows is None
    handle.remove()


def test_a_search_streams_its_table_with_the_same_result(small, tmp_path, monkeypatch) -> None:
    resident, streamed = tmp_path / "resident", tmp_path / "streamed"
    search(small("device=cuda", *WIDTH_SEARCH), resident)
    monkeypatch.setattr(problem, "room_beside", lambda device, needed: 0)
    search(small("device=cuda", *WIDTH_SEARCH), streamed)
    for name in (DECISION_MASKS, REPAIR_FILE):
        assert (streamed / name).read_bytes() == (resident / name).read_bytes()


def test_a_search_on_the_gpu_gives_the_same_bytes_twice(small, tmp_path) -> None:
    recipe = small(*WIDTH_SEARCH, "device=cuda")
    first, second = (search(recipe, tmp_path / name) for name in ("first", "second"))
    for name in (DECISION_MASKS, REPAIR_FILE):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert first.heldout_loss == second.heldout_loss


def test_a_search_on_the_gpu_resumes_bit_for_bit(small, tmp_path, monkeypatch) -> None:
    take_step = search_loop._take_step

    def stop_after_two(problem: search_loop.Problem, loop: search_loop.LoopState) -> search_loop.Row:
        row = take_step(problem, loop)
        if loop.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    recipe = small(*WIDTH_SEARCH, "device=cuda")
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    search(recipe, uninterrupted)
    monkeypatch.setattr(search_loop, "_take_step", stop_after_two)
    with pytest.raises(search_loop.Interrupted):
        search(recipe, interrupted)
    monkeypatch.setattr(search_loop, "_take_step", take_step)
    search(recipe, interrupted)
    first, second = (latest_checkpoint(run).state for run in (interrupted, uninterrupted))
    assert first.losses.tolist() == second.losses.tolist()
    assert (interrupted / DECISION_MASKS).read_bytes() == (uninterrupted / DECISION_MASKS).read_bytes()


def test_a_search_on_the_gpu_is_as_good_as_one_on_the_cpu(small, tmp_path) -> None:
    on_cpu, on_gpu = (search(small(*WIDTH_SEARCH, f"device={device}"), tmp_path / device) for device in ("cpu", "cuda"))
    assert on_gpu.heldout_loss == pytest.approx(on_cpu.heldout_loss, rel=0.02)
    assert on_gpu.sparsity == pytest.approx(on_cpu.sparsity, abs=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_spread_over_two_gpus_has_the_same_loss() -> None:
    on_one, on_two = (load_prunable(resolve("demo"), "float32", device) for device in ("cuda", "cuda:0,cuda:1"))
    space, units = group_units(on_one.shape)
    model_mask = on_one.shape.model_mask(space, torch.arange(space.n) % 3 > 0, units)
    tokens = torch.arange(48).view(2, 24)
    expected = Evaluator(on_one).losses([model_mask], tokens)
    torch.testing.assert_close(Evaluator(on_two).losses([model_mask], tokens), expected, rtol=1e-6, atol=0)
