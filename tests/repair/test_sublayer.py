"""The repair of whole blocks: never worse than least squares, on gradients that a masked dense copy confirms."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.blocks import BLOCKS, columns_of, model_unchanged, moments_by_hand, observed_inputs, output_linear
from helpers.fits import read_block, windows
from helpers.masks import dense_except, dense_mask, draw, masked, repaired_by_hand
from helpers.messages import refused
from helpers.models import EXPERT_ARCHITECTURES, tiny_model
from torch import Tensor, nn
from torch.optim import AdamW

from pgprune_cli.errors import RunError
from pgprune_cli.forward import states
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import LayerMask, ModelMask, RepairedBlock, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections
from pgprune_cli.model.unit_tensors import KeptElements, gather, kept_shape
from pgprune_cli.repair import sublayer, training
from pgprune_cli.repair.equations import repaired_output
from pgprune_cli.repair.least_squares import Repaired, repair
from pgprune_cli.repair.training import Weights, add_gradients, scheduled, trained

DAMPING = 1e-3

COUNTS = [((2, 1), 11), (4, 13), (0, 9), ((1, 1), 0)]
"""Layer 1 keeps its attention, layer 2 has none, and layer 3 has no FFN."""


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Several steps an epoch, of four windows each."""
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 80)
    monkeypatch.setattr(sublayer, "LEARNING_RATE", 1e-2)


def refit(model: nn.Module, mask: ModelMask, text: list[Tensor] | None = None, epochs: int = 6) -> Repaired:
    """Repair all blocks of a model, which must be unchanged afterwards."""
    with model_unchanged(model):
        return repair(PrunableModel.of(model), mask, text or windows(), "sublayer", DAMPING, epochs=epochs)


def is_partial(mask: Tensor) -> bool:
    return bool(mask.any()) and not mask.all()


class Behind:
    """One block, whole and pruned, behind the blocks that are pruned and repaired before it."""

    def __init__(self, model: nn.Module, mask: ModelMask, repaired: RepairedBlocks, index: int, name: str) -> None:
        self.prunable, self.mask, self.repaired = PrunableModel.of(model), mask, dict(repaired)
        self.index, self.name = index, name
        with self.shrunk(BLOCKS.index((index, name)), {}):
            self.inputs, self.weights = observed_inputs(self.prunable, index, name, windows())
            self.expected = self.outputs()

    def shrunk(self, blocks: int, own: RepairedBlocks):
        """Shrink the first `blocks` blocks of the model."""
        first, dense = BLOCKS[:blocks], dense_mask(self.prunable.module)
        front = tuple(
            LayerMask(*((kept if (place, name) in first else whole).of(name) for name in ("attention", "ffn")))
            for place, (kept, whole) in enumerate(zip(self.mask, dense, strict=True))
        )
        repaired = {key: block for key, block in self.repaired.items() if key in first} | dict(own)
        return Evaluator(self.prunable).shrunk(front, repaired)

    def outputs(self) -> Tensor:
        """Return what the block writes, `(N, hidden)` float64."""
        seen: list[Tensor] = []
        block = self.prunable.shape.blocks[self.index][self.name]
        module = self.prunable.layers[self.index].get_submodule(block.module)
        handle = module.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            for tokens in windows():
                self.prunable.module(input_ids=tokens, use_cache=False)
        handle.remove()
        return torch.cat([output.flatten(0, -2) for output in seen]).double()

    def error(self, own: RepairedBlock) -> float:
        """Return the weighted squared error of the pruned block with some repair, relative to the whole block."""
        with self.shrunk(BLOCKS.index((self.index, self.name)) + 1, {(self.index, self.name): own}):
            error = (self.outputs() - self.expected).square().sum(1) @ self.weights
        return float(error / (self.expected.square().sum(1) @ self.weights))

    def least_squares(self) -> RepairedBlock:
        """Return the closed-form repair, from inputs observed in whole forward passes."""
        linear = output_linear(self.prunable.module, self.index, self.name)
        columns = columns_of(self.mask[self.index].of(self.name), linear.in_features)
        moments = moments_by_hand(self.inputs, self.weights)
        return repaired_output(linear.weight, linear.bias, moments, columns, DAMPING, with_bias=False)


def assert_no_block_is_worse(model: nn.Module, mask: ModelMask, repaired: RepairedBlocks, tolerance: float) -> int:
    """Return how many blocks have become better than least squares makes them."""
    better = 0
    for (index, name), own in repaired.items():
        behind = Behind(model, mask, repaired, index, name)
        before, after = behind.error(behind.least_squares()), behind.error(own)
        assert after <= before * (1 + tolerance), (index, name)
        better += after < 0.99 * before
    return better


def test_no_block_is_worse_than_least_squares_makes_it(architecture: str) -> None:
    model = tiny_model(architecture)
    mask = draw(model, COUNTS, seed=1)
    repaired = refit(model, mask).blocks
    partial = [(index, name) for index, name in BLOCKS if is_partial(mask[index].of(name))]
    assert sorted(repaired) == partial  # nothing for whole and for removed blocks
    prunable = PrunableModel.of(model)
    for (index, name), own in repaired.items():
        block, layer = prunable.shape.blocks[index][name], prunable.layers[index]
        module, dense = layer.get_submodule(block.module), prunable.family.unit_tensors(layer, block)
        inner = {
            tensor.name: kept_shape(tensor, module.get_parameter(tensor.name).shape, mask[index].of(name))
            for tensor in dense[:-1]
        }
        assert not own.inner or {key: value.shape for key, value in own.inner.items()} == inner
        assert all(value.dtype == torch.float32 and not value.requires_grad for value in own.inner.values())
    assert assert_no_block_is_worse(model, mask, repaired, 1e-4) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama-biased", "gemma2", "qwen3_5_text"])
def test_no_block_is_worse_in_half_precision(architecture: str, dtype: torch.dtype) -> None:
    """Measured in the same precision, in which a pass through the model is rounded differently."""
    model = tiny_model(architecture).to(dtype)
    mask = draw(model, COUNTS, seed=1)
    repaired = refit(model, mask).blocks
    assert all(value.dtype == dtype for own in repaired.values() for value in (own.weight, *own.inner.values()))
    assert assert_no_block_is_worse(model, mask, repaired, 0.02) >= 1


@pytest.mark.parametrize("weight_format", ["int8"])
def test_blocks_of_rounded_weights_are_refitted_unrounded(weight_format: str) -> None:
    model = tiny_model("qwen2")
    quantize_projections(model, weight_format)
    mask = draw(model, COUNTS, seed=1)
    repaired = refit(model, mask).blocks
    assert all(own.weight.dtype == torch.float32 for own in repaired.values())
    assert assert_no_block_is_worse(model, mask, repaired, 1e-4) >= 1
    assert not any(getattr(module, "kept", None) is not None for module in model.modules())


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_experts_get_least_squares_and_attention_is_refitted(architecture: str) -> None:
    model = tiny_model(architecture)
    mask = draw(model, [((2, 1), 12)] * 4, seed=1)
    repaired = refit(model, mask).blocks
    attention = [own for (_, name), own in repaired.items() if name == "attention"]
    assert any(own.inner for own in attention)
    assert not any(own.inner for (_, name), own in repaired.items() if name == "ffn")
    closed = repair(PrunableModel.of(model), mask, windows(), "least-squares", DAMPING).blocks
    assert sorted(closed) == sorted(repaired)
    assert all(own.weight.shape == closed[key].weight.shape for key, own in repaired.items())


def test_same_text_gives_the_same_weights_bit_for_bit() -> None:
    model = tiny_model("qwen3")
    mask = draw(model, COUNTS, seed=1)
    once, twice = refit(model, mask).blocks, refit(model, mask).blocks
    assert list(once) == list(twice)
    for key, own in once.items():
        assert torch.equal(own.weight, twice[key].weight)
        assert list(own.inner) == list(twice[key].inner)
        assert all(torch.equal(value, twice[key].inner[name]) for name, value in own.inner.items())


def test_a_model_that_loses_nothing_is_not_refitted() -> None:
    model = tiny_model("qwen3")
    assert refit(model, dense_mask(model)).blocks == {}


@pytest.mark.parametrize("count", [1, 2])
def test_text_of_very_few_windows_is_enough(count: int) -> None:
    """One window cannot be set aside and trained on: it leaves the closed-form repair."""
    model = tiny_model("llama-gqa")
    mask, text = draw(model, COUNTS, seed=1), windows(count)
    repaired = refit(model, mask, text).blocks
    closed = repair(PrunableModel.of(model), mask, text, "least-squares", DAMPING).blocks
    assert sorted(repaired) == sorted(closed)
    if count == 1:
        assert all(torch.equal(own.weight, closed[key].weight) and not own.inner for key, own in repaired.items())


def test_a_fit_that_finds_nothing_better_leaves_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sublayer, "LEARNING_RATE", 1e3)
    model = tiny_model("llama-gqa")
    mask = draw(model, COUNTS, seed=1)
    repaired = refit(model, mask, epochs=1).blocks
    closed = repair(PrunableModel.of(model), mask, windows(), "least-squares", DAMPING).blocks
    assert all(torch.equal(own.weight, closed[key].weight) and not own.inner for key, own in repaired.items())


# --- one fit


WHOLE = (1 << 20, 1 << 20)

GRADIENTS = [(3, "attention", ((2, 1), WHOLE)), (1, "attention", (3, WHOLE)), (2, "ffn", (4, 9))]


@pytest.mark.parametrize(("index", "name", "kept"), GRADIENTS)
def test_gradients_are_those_of_the_masked_dense_block(architecture: str, index: int, name: str, kept: tuple) -> None:
    """The reference is a dense copy whose removed elements are zeroed, differentiated through its whole layer."""
    model = tiny_model(architecture)
    model_mask = dense_except(model, index, *kept)
    mask = model_mask[index].of(name)
    read = read_block(model, index, name)
    moved = {key: weight.requires_grad_() for key, weight in read.weights(mask).items()}
    chosen = torch.tensor([4, 1])
    read.fit(mask)._set_gradients(moved, chosen, 0.5)

    copied = repaired_by_hand(model, model_mask, {})
    prunable = PrunableModel.of(copied)
    layer, seen = prunable.layers[index], []
    module = layer.get_submodule(read.block.module)
    tensors = prunable.family.unit_tensors(layer, read.block)
    with masked(copied, model_mask):
        handle = module.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        parameters = [module.get_parameter(tensor.name).requires_grad_() for tensor in tensors]
        copied(input_ids=torch.cat(windows())[chosen], use_cache=False)
        handle.remove()
    error = (seen[0] - read.text.outputs[chosen]).square().sum(-1) * read.text.weights[chosen]
    expected = torch.autograd.grad(0.5 * error.sum(), parameters)
    for tensor, gradient in zip(tensors, expected, strict=True):
        own = gather(gradient, tensor, KeptElements(mask))
        got = moved[tensor.name].grad
        assert got is not None
        torch.testing.assert_close(got, own, rtol=1e-3, atol=max(1e-5, 1e-4 * float(own.abs().max())))


def test_gradients_are_the_slopes_of_the_error() -> None:
    """Finite differences of `squared_error` along a random direction."""
    model = tiny_model("qwen2").double()
    mask = dense_except(model, 0, ((2, 1)), (4, 9))[0].attention
    read = read_block(model, 0, "attention")
    fit, weights, chosen = read.fit(mask), read.weights(mask), torch.arange(3)
    moved = {key: weight.requires_grad_() for key, weight in weights.items()}
    fit._set_gradients(moved, chosen, 1.0)
    torch.manual_seed(0)
    way = {key: torch.randn_like(weight) for key, weight in weights.items()}
    step = 1e-3

    def error(sign: int) -> float:
        shifted = {key: weight.detach() + sign * step * way[key] for key, weight in weights.items()}
        return fit.squared_error(shifted, chosen)

    slope = sum(float((weight.grad * way[key]).sum()) for key, weight in moved.items() if weight.grad is not None)
    assert (error(1) - error(-1)) / (2 * step) == pytest.approx(slope, rel=1e-3)


def fails_above(largest: int, module: nn.Module) -> Iterator[int]:
    """Let a module run out of memory on more windows than `largest`."""

    def fail(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = module.register_forward_pre_hook(fail)
    yield largest
    handle.remove()


@pytest.mark.parametrize("largest", [1, 2])
def test_a_step_that_does_not_fit_is_taken_in_parts(largest: int) -> None:
    """Mistral's attention mask has the size of the batch. Equal up to the rounding of sums over other parts."""
    model = tiny_model("mistral")
    mask = dense_except(model, 0, 2, (4, 9))[0]
    for name in ("attention", "ffn"):
        own = mask.of(name)
        whole = read_block(model, 0, name)
        start = whole.weights(own)
        expected = whole.fit(own).solve(start)
        parts = read_block(model, 0, name)
        failing = fails_above(largest, parts.layer.mlp.act_fn if name == "ffn" else parts.layer.self_attn.o_proj)
        next(failing)
        got = parts.fit(own).solve(start)
        list(failing)
        assert parts.run.runs[0].splitter.max_windows == largest
        assert expected is not start
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-3)


def test_a_window_that_does_not_fit_is_an_error_and_the_model_is_unchanged() -> None:
    model = tiny_model("llama-gqa")
    mask = dense_except(model, 0, 2, (4, 9))[0].ffn
    with model_unchanged(model):
        read = read_block(model, 0, "ffn")
        failing = fails_above(0, read.layer.mlp.act_fn)
        next(failing)
        with pytest.raises(RunError, match="out of memory with one window at a time"):
            read.fit(mask).solve(read.weights(mask))
        list(failing)


PLACES = {"gradients": (sublayer, "add_gradients"), "norm": (nn.utils, "clip_grad_norm_"), "means": (AdamW, "step")}


def all_fits(model: nn.Module) -> list[Tensor]:
    """Return what all fits of a model's blocks find, the last of which is to predictions."""
    mask = draw(model, [((2, 1), 11), (4, 13), (3, 9), ((2, 1), 6)], seed=1)
    blocks = repair(PrunableModel.of(model), mask, windows(), "sublayer", DAMPING, epochs=1, last_layers=1).blocks
    return [tensor for block in blocks.values() for tensor in block.tensors]


@contextmanager
def out_of_memory(place: str, calls: Collection[int]) -> Iterator[list[int]]:
    """Inside the `with`, some calls of a function that fits make find no memory. Yields a list of all calls."""
    owner, name = PLACES[place]
    run, made = getattr(owner, name), list[int]()

    def fail(*arguments: Any, **options: Any) -> Any:
        made.append(len(made))
        if made[-1] in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_fit_starts_again_behind_states_on_the_host_when_memory_runs_out(
    place: str, which: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last call is one of the fit to predictions, except that it adds its gradients elsewhere."""
    monkeypatch.setattr("pgprune_cli.forward.shards.SHARDS", 1)  # as on a GPU
    monkeypatch.setattr(states, "free_for_states", lambda model: 10**12)
    model = tiny_model("llama-gqa")
    with out_of_memory(place, ()) as calls:
        expected = all_fits(model)
    assert not capfd.readouterr().err
    with out_of_memory(place, [calls[which]]), model_unchanged(model):
        assert all(map(torch.equal, all_fits(model), expected))
    assert capfd.readouterr().err.count("out of memory") == 1


@pytest.mark.parametrize("place", ["norm", "means"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_fit_without_memory_ends_in_one_line(place: str, which: int) -> None:
    model = tiny_model("llama-gqa")
    with out_of_memory(place, ()) as calls:
        all_fits(model)
    with (
        model_unchanged(model),
        out_of_memory(place, calls[which:]),
        refused("out of memory", "AdamW", "start the search again", error=RunError),
    ):
        all_fits(model)


def test_gradients_are_added_to_all_weights_or_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: torch.ones(2, 2) for name in "ab"}
    add_gradients(weights, [torch.ones(2, 2)] * 2)
    contiguous, count = Tensor.contiguous, itertools.count()

    def fail(tensor: Tensor) -> Tensor:
        if next(count) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return contiguous(tensor)

    monkeypatch.setattr(Tensor, "contiguous", fail)
    with pytest.raises(torch.OutOfMemoryError):
        add_gradients(weights, [torch.ones(2, 2)] * 2)
    assert all(torch.equal(weight.grad, torch.ones(2, 2)) for weight in weights.values())


def test_training_does_not_depend_on_how_weights_lie_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    start, goal = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)

    def set_own(weights: Weights, _: Tensor) -> None:
        add_gradients(weights, [weights["weight"].detach().T.contiguous().T - goal])

    steps = list(torch.arange(8).split(1))
    rows, columns = (
        list(trained({"weight": weight}, steps, 0.1, set_own)) for weight in (start, start.T.contiguous().T)
    )
    for own, other in zip(rows, columns, strict=True):
        torch.testing.assert_close(own["weight"], other["weight"], rtol=0, atol=0)


def test_learning_rate_rises_and_then_falls_to_nothing() -> None:
    rates = [scheduled(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[4] == 1.0
    assert 0 < rates[-1] < 0.01
    assert [scheduled(step, 1) for step in range(1)] == [1.0]
