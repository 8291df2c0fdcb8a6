"""One layer of the size of LLaMA-7B's, and one of Llama-3-8B's, with random weights: memory, time and correctness.

`GPU_TESTS_DEVICE=cpu` runs all that needs no CUDA function on the CPU, on a small layer.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.fp8 import rounded_product
from helpers.gpu import DEVICE, SHAPES, OneLayer, needs_cuda, waiting_is_an_error, write_one_layer
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.forward.moments import Moments
from pgprune_cli.jobs.estimate import estimate
from pgprune_cli.jobs.evaluate import evaluate
from pgprune_cli.jobs.evaluation_request import EvaluationRequest
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.recover import recover
from pgprune_cli.jobs.recovery_request import Request
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_prunable
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import Fp8Linear, check_fp8, quantize_projections
from pgprune_cli.model.source import resolve
from pgprune_cli.repair.equations import repaired_output, solve_prefixes
from pgprune_cli.repair.width_table import solve_layers
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.training_history import read_training_history
from pgprune_cli.scores.obs import removal_order, units_per_round
from pgprune_cli.search.costs import synchronised_clock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

UNSOLVED = ("search.forward_passes=0", "repair.method=none")
"""A search that decides by the scores alone."""


class Run(NamedTuple):
    """A finished search. peak: bytes allocated at most, 0 on the CPU."""

    directory: Path
    decision: Decision
    peak: int


@pytest.fixture(scope="module", params=SHAPES)
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OneLayer:
    return write_one_layer(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def run(layer: OneLayer) -> Run:
    reset_peak()
    decision = search(layer.recipe(), layer.folder / "run")
    return Run(layer.folder / "run", decision, peak())


@pytest.fixture(scope="module")
def pruned(layer: OneLayer, run: Run) -> Path:
    export(run.directory, layer.folder / "pruned")
    return layer.folder / "pruned"


@pytest.fixture
def model(layer: OneLayer) -> PrunableModel:
    return load_prunable(resolve(str(layer.folder / "model")), "bfloat16", DEVICE)


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


class Equations(NamedTuple):
    """An output projection, the second moments of its inputs, and R."""

    weight: Tensor
    second: Tensor
    root: Tensor


def equations(layer: OneLayer, dtype: torch.dtype = torch.float32) -> Equations:
    """Return those of an FFN with random inputs, in a dtype on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = torch.randn(2 * layer.channels, layer.channels, generator=generator, device=DEVICE)
    weight = torch.randn(layer.hidden, layer.channels, generator=generator, device=DEVICE)
    return Equations(weight, (inputs.T @ inputs / len(inputs)).to(dtype), torch.eye(layer.hidden, device=DEVICE))


def solved(layer: OneLayer, given: Equations) -> tuple[Tensor, dict[int, Tensor]]:
    """Solve the projection at every sixteenth of its width."""
    columns, counts = torch.arange(layer.channels, device=DEVICE), range(0, layer.channels, layer.channels // 16)
    return solve_prefixes(given.weight, given.second, columns, list(counts), given.root, 1e-3, solve=True)


def tokens_for(model: PrunableModel, windows: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (windows, 128), generator=torch.Generator().manual_seed(0))


# --- memory and time


@needs_cuda
def test_a_search_allocates_at_most_what_is_estimated(layer, run, capsys) -> None:
    """What is kept on the device only while there is room comes on top."""
    memory = estimate(layer.recipe())["memory"]
    estimated = memory["device"] + memory["width_table"] + memory["hidden_states"] * memory["hidden_states_on_device"]
    with capsys.disabled():
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in run.decision.phases.items())
        print(f"\n{layer.channels} × {layer.hidden}: {run.peak / 1e9:.2f} GB of {estimated / 1e9:.2f} GB; {phases}")
    assert run.peak <= 1.05 * estimated


def test_solving_in_float32_is_as_good_as_in_float64(layer, capsys) -> None:
    """Prints the seconds of obs, of the widths and of one repair in both."""
    errors, fitted = {}, {}
    for dtype in (torch.float32, torch.float64):
        given = equations(layer, dtype)
        clock = [synchronised_clock(torch.device(DEVICE))]
        removal_order(given.weight, given.second, layer.channels, units_per_round(layer.channels))
        clock.append(synchronised_clock(torch.device(DEVICE)))
        errors[dtype], _ = solved(layer, given)
        clock.append(synchronised_clock(torch.device(DEVICE)))
        moments = Moments(given.second, given.second.new_zeros(layer.channels), given.second.new_ones(()))
        kept = torch.arange(0, layer.channels, 2, device=DEVICE)
        fitted[dtype] = repaired_output(given.weight, None, moments, kept, 1e-3, with_bias=False).weight
        clock.append(synchronised_clock(torch.device(DEVICE)))
        seconds = [(after - before) / 1e9 for before, after in pairwise(clock)]
        with capsys.disabled():
            names = zip(("obs", "widths", "repair"), seconds, strict=True)
            print(f"\n{layer.channels} × {layer.hidden}, {dtype}: {', '.join(f'{n} {s:.2f} s' for n, s in names)}")
    torch.testing.assert_close(errors[torch.float32], errors[torch.float64], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fitted[torch.float32], fitted[torch.float64], rtol=1e-3, atol=1e-3)


def test_a_width_table_is_the_same_twice(layer, model) -> None:
    units = {
        (0, block.name): torch.arange(model.shape.grids[block.name][0].elements)
        for block in model.family.blocks_of(model.layers[0])
    }
    ranks = {key: torch.rand(len(own), generator=torch.Generator().manual_seed(1)) for key, own in units.items()}
    batches = list(tokens_for(model, 32).split(8))
    (_, first), (_, second) = (
        next(iter(solve_layers(model, ranks, units, batches, 1e-3, solve=True))) for _ in range(2)
    )
    for name, widths in first.items():
        assert torch.equal(widths.errors, second[name].errors)
        assert widths.weights.keys() == second[name].weights.keys() != set()
        assert all(torch.equal(weight, second[name].weights[kept]) for kept, weight in widths.weights.items())


# --- a step, and what it solves


def test_repaired_outputs_may_stay_on_the_host(layer, run, model) -> None:
    """They are copied to the device without making the host wait."""
    repaired = {key: RepairedBlock(block.weight.cpu(), block.bias) for key, block in run.decision.repaired.items()}
    assert repaired
    moved = {key: RepairedBlock(block.weight.to(DEVICE), block.bias) for key, block in repaired.items()}
    evaluator, tokens = Evaluator(model), tokens_for(model, 4).to(DEVICE)
    expected = evaluator._summed(run.decision.model_mask, tokens, moved)
    with waiting_is_an_error() if DEVICE == "cuda" else nullcontext():
        actual = evaluator._summed(run.decision.model_mask, tokens, repaired)
    assert torch.equal(actual, expected)


@needs_cuda
def test_equations_that_do_not_fit_are_solved_on_the_cpu(layer, capfd) -> None:
    given = equations(layer)
    expected, _ = solved(layer, given)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**25) / total)
    try:
        errors, _ = solved(layer, given)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-3)
    assert "pgprune: cuda:0: out of memory while solving" in capfd.readouterr().err


# --- loading and the other jobs


def test_weights_are_read_to_the_device(layer) -> None:
    """transformers gets the device map {"": device}, which needs accelerate."""
    pytest.importorskip("accelerate")
    source = resolve(str(layer.folder / "model"))
    reset_peak()
    before = peak()
    on_device, on_cpu = load_prunable(source, "bfloat16", DEVICE), load_prunable(source, "bfloat16", "cpu")
    weights = dict(on_cpu.module.named_parameters())
    for name, parameter in on_device.module.named_parameters():
        assert parameter.device.type == DEVICE
        assert torch.equal(parameter.cpu(), weights[name])
    assert peak() - before <= 1.5 * sum(weight.nbytes for weight in weights.values())


def test_taylor_scores_are_finite(layer, tmp_path) -> None:
    recipe = layer.recipe("scores.metric=taylor", "scores.windows=4", "scores.seqlen=256", *UNSOLVED)
    assert init_scores(recipe, tmp_path / "run")
    assert 0.45 < search(recipe, tmp_path / "run").sparsity < 0.55


def test_a_latency_budget_is_met(layer, tmp_path) -> None:
    budget = ("budget.measure=latency", "budget.context=256", "scores.metric=magnitude")
    decision = search(layer.recipe(*budget, *UNSOLVED), tmp_path / "run")
    assert 0 < decision.budget["kept"] <= 0.5


def test_a_run_is_evaluated(layer, run) -> None:
    request = EvaluationRequest(
        model=str(run.directory), corpora=(f"words={layer.folder / 'text.txt'}",), seqlens=(128,), max_windows=16
    )
    (result,) = evaluate(request)
    (row,) = result["perplexity"]
    assert math.log(row["ppl"]) == pytest.approx(run.decision.heldout_loss, rel=0.05)


def test_fp8_products_equal_those_of_rounded_numbers_in_float32(model) -> None:
    try:
        check_fp8(torch.device(DEVICE), torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    quantize_projections(model.module, "fp8")
    linears = [module for module in model.module.modules() if isinstance(module, Fp8Linear)]
    assert linears
    for linear in linears:
        inputs = torch.randn(64, linear.values.shape[1], device=DEVICE).bfloat16()
        expected = rounded_product(inputs, linear.values, linear.scale)
        torch.testing.assert_close(linear(inputs).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "settings",
    [("train=all", "teacher=live"), ("train=all", "teacher=cached", "top_k=16"), ("train=lora", "teacher=live")],
    ids=["live", "cached", "lora"],
)
def test_a_recovery_of_a_few_steps_ends(layer, pruned, tmp_path, settings) -> None:
    pytest.importorskip("accelerate")
    if "train=lora" in settings:
        pytest.importorskip("peft")
    recipe = layer.recipe(*(f"recover.{setting}" for setting in settings))
    record = recover(Request(str(pruned), tmp_path / "out", tmp_path / "training", recipe))
    rows = read_training_history(tmp_path / "training")
    assert rows[-1].tokens == 4096 and all(math.isfinite(row.loss) for row in rows[1:])
    assert math.isfinite(record["loss_after"])
