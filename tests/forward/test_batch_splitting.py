"""When memory runs out, every pass over text continues in parts: same result, and no input counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.masks import keep_first
from helpers.models import VOCABULARY, tiny_model
from helpers.units import chain_units, ranks_of
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.curvature import output_curvature
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.moments import MomentCollector
from pgprune_cli.model.families.llama import LLAMA
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.repair.width_table import solve_layers
from pgprune_cli.scores.metrics import score

WINDOWS = 5


def text() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (windows, 12), generator=generator) for windows in (WINDOWS, 3, WINDOWS)]


@contextmanager
def memory_for(windows: int, *modules: nn.Module) -> Iterator[list[int]]:
    """Inside, these modules fail on more windows than this. Yields the number of windows of every call."""
    sizes: list[int] = []

    def fail(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > windows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handles = [module.register_forward_pre_hook(fail) for module in modules]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def memory_to_observe(windows: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, the products of observed inputs fail on more windows than this. Yields the windows of every call."""
    add, sizes = MomentCollector._add, []

    def observed(self: MomentCollector, name: str, residual: Tensor, inputs: Tensor, *rest: Tensor) -> None:
        sizes.append(len(inputs))
        if name == "ffn" and len(inputs) > windows:  # those of the attention have been added already
            raise torch.OutOfMemoryError("CUDA out of memory")
        add(self, name, residual, inputs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MomentCollector, "_add", observed)
        yield sizes


# --- the splitter itself


@pytest.mark.parametrize(
    ("fits", "tried"), [(9, [7]), (4, [7, 4, 3]), (2, [7, 4, 2, 2, 2, 1]), (1, [7, 4, 2, *[1] * 7])]
)
def test_every_window_runs_once_and_in_order(fits: int, tried: list[int]) -> None:
    splitter, taken, sizes = BatchSplitter(), [], []

    def run(part: slice) -> None:
        windows = range(7)[part]
        sizes.append(len(windows))
        if len(windows) > fits:
            raise torch.OutOfMemoryError
        taken.extend(windows)

    splitter.run_slices(7, run)
    assert taken == list(range(7))
    assert sizes == tried
    sizes.clear()
    splitter.run_slices(7, run)
    assert max(sizes) <= fits  # a size that failed is not tried again


def test_one_window_that_does_not_fit_is_an_error() -> None:
    def fails(_: object) -> None:
        raise torch.OutOfMemoryError

    for act in (lambda: BatchSplitter().run_slices(3, fails), lambda: BatchSplitter().run_batches(text(), fails)):
        with pytest.raises(RunError, match="out of memory with one window at a time"):
            act()


def test_other_errors_are_passed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        BatchSplitter().run_slices(3, lambda part: print(1 // 0))


# --- passes over text


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.act_fn for layer in model.model.layers]


def half(model: nn.Module) -> ModelMask:
    return keep_first(model, [((2, 2), 12)] * 4)


def scores_by(metric: str) -> Callable[[nn.Module], list[Tensor]]:
    return lambda model: list(score(PrunableModel.of(model), metric, text(), 0).values())


def table_of(model: nn.Module) -> list[Tensor]:
    prunable = PrunableModel.of(model)
    _, units = chain_units(prunable.shape)
    ranks = ranks_of(prunable.shape, units)
    solved = [
        block
        for _, blocks in solve_layers(prunable, ranks, units, text(), 1e-2, solve=True)
        for block in blocks.values()
    ]
    return [tensor for block in solved for tensor in (block.errors, *block.weights.values())]


def repair_of(model: nn.Module) -> list[Tensor]:
    repaired = repair(PrunableModel.of(model), half(model), text(), "least-squares", 1e-2)
    return [output.weight for output in repaired.blocks.values()]


def whole_blocks_of(model: nn.Module) -> list[Tensor]:
    repaired = repair(PrunableModel.of(model), half(model), text(), "sublayer", 1e-2, epochs=1)
    return [output.weight for output in repaired.blocks.values()]


PASSES = {metric: scores_by(metric) for metric in ("wanda-sp", "flap", "obs", "taylor")} | {
    "width table": table_of,
    "repair": repair_of,
    "repair of whole blocks": whole_blocks_of,
    "curvature": lambda model: [output_curvature(PrunableModel.of(model), text())],
    "layer-wise run": lambda model: layerwise(model),
}


def layerwise(model: nn.Module) -> list[Tensor]:
    run = start_layerwise(PrunableModel.of(model), text())
    for index in range(len(run.layers)):
        run.advance(index)
    return run.hidden_states


@pytest.mark.parametrize("name", PASSES)
def test_pass_in_parts_equals_the_whole_pass(name: str) -> None:
    """Equal up to the rounding of products of other sizes and of sums over other parts."""
    model = tiny_model("llama-gqa")
    expected = PASSES[name](model)
    with memory_for(2, *layers_of(model)) as sizes:
        in_parts = PASSES[name](model)
    assert max(sizes) >= WINDOWS - 1  # a fit does not read the windows set aside
    assert sizes.count(max(sizes)) < 4  # it remembers what fits
    for part, whole in zip(in_parts, expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["obs", "width table", "repair", "repair of whole blocks"])
def test_products_that_do_not_fit_are_computed_in_parts_and_count_every_input_once(name: str, monkeypatch) -> None:
    model = tiny_model("qwen2")
    expected = PASSES[name](model)
    with memory_to_observe(2, monkeypatch) as sizes:
        in_parts = PASSES[name](model)
    assert max(sizes) == WINDOWS
    for part, whole in zip(in_parts, expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_layers_get_attention_masks_of_the_shape_of_each_part() -> None:
    """Mistral's window of 16 needs a mask, and the mask has the size of the batch."""
    model = tiny_model("mistral")
    tokens = [torch.randint(VOCABULARY, (WINDOWS, 40), generator=torch.Generator().manual_seed(0))]
    whole, parts = start_layerwise(PrunableModel.of(model), tokens), start_layerwise(PrunableModel.of(model), tokens)
    whole.advance(0)
    with memory_for(2, model.model.layers[0].mlp):
        parts.advance(0)
    torch.testing.assert_close(parts.hidden_states[0], whole.hidden_states[0], rtol=1e-5, atol=1e-5)


def test_pass_that_fits_sums_each_batch_in_one_piece() -> None:
    """Bit for bit: the sums of a batch are computed at once, batch after batch."""
    model = tiny_model("llama-mha")
    collector = MomentCollector(LLAMA, [LLAMA.ffn])
    seen: list[tuple[Tensor, Tensor]] = []
    names = (LLAMA.residual, LLAMA.ffn.output_path)
    start_layerwise(PrunableModel.of(model), text()).observe(
        0, {**collector.observers, names[::-1]: lambda x, r: seen.append((r, x))}
    )
    second = torch.zeros(())
    for residual, x in seen:
        weight = residual.flatten(0, -2).square().mean(-1, keepdim=True).clamp_min(1e-12).reciprocal()
        rows = x.flatten(0, -2) * weight.sqrt()
        second = second + rows.T @ rows
    assert torch.equal(collector.sums["ffn"].second.matrix(), second)


@pytest.mark.parametrize("name", PASSES)
def test_pass_is_an_error_when_one_window_does_not_fit_and_the_model_is_unchanged(name: str) -> None:
    model = tiny_model("llama-gqa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with memory_for(0, *layers_of(model)), pytest.raises(RunError, match="out of memory with one window at a time"):
        PASSES[name](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
