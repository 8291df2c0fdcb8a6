"""Bytes against the allocations of models that run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.masks import keep_first
from helpers.medium import medium_model, medium_recipe, random_batches
from helpers.memory import Allocations
from helpers.models import EXPERT_ARCHITECTURES, tiny_config
from helpers.units import ranks_of

from pgprune_cli.estimate.memory import (
    Memory,
    block_fit_bytes,
    block_text_bytes,
    divergence_bytes,
    layer_bytes,
    logit_bytes,
    memory,
    predicted_bytes,
    repaired_bytes,
    sampling_bytes,
    slice_bytes,
    solving_bytes,
    unpacked_bytes,
)
from pgprune_cli.estimate.sizes import Sizes, Texts, tokens_in
from pgprune_cli.forward.block_text import BlockText
from pgprune_cli.forward.divergence import Divergence
from pgprune_cli.forward.element_order import elements_in_order
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.forward.sampling import sampled_batches
from pgprune_cli.forward.shrunk_block import ShrinkableBlock
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections
from pgprune_cli.repair import last_layers
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.repair.sublayer import SublayerFit
from pgprune_cli.repair.training import Weights
from pgprune_cli.repair.width_table import solve_layers, table_bytes
from pgprune_cli.scores.metrics import score
from pgprune_cli.search.budget import estimated_units

pytestmark = pytest.mark.usefixtures("kernel_for_groups")


def peak(run: Callable[[], object]) -> int:
    with Allocations() as seen:
        run()
    return seen.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["full", "fp8"])
@pytest.mark.parametrize(
    "shape",
    [
        {"intermediate_size": 192},
        {"intermediate_size": 16},
        {"intermediate_size": 16, "num_key_value_heads": 8},
        {"intermediate_size": 192, "vocab_size": 3000},
    ],
    ids=["wide", "attention", "attention without groups", "vocabulary"],
)
def test_what_a_dense_forward_allocates(shape: dict[str, int], weights: str, dtype: torch.dtype) -> None:
    model = medium_model(dtype, **shape)
    if weights != "full":
        quantize_projections(model, weights)
    (tokens,) = random_batches(windows=4, length=64, batches=1)
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"weight_format={weights}"))
    expected = max(layer_bytes(sizes, tokens.numel(), 64), logit_bytes(sizes, tokens))
    assert expected == pytest.approx(peak(lambda: summed_loss(model, tokens)), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "phi3"])
def test_dense_forward_of_other_families_allocates_what_is_estimated(architecture: str, dtype: torch.dtype) -> None:
    """Gemma 2 soft-caps its attention scores, so that they exist as a whole. Phi-3 fuses projections."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    for name, value in {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 200}.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    (tokens,) = random_batches(windows=4, length=64, batches=1)
    sizes = Sizes(PrunableModel.of(model), medium_recipe())
    expected = max(layer_bytes(sizes, tokens.numel(), 64), logit_bytes(sizes, tokens))
    assert expected == pytest.approx(peak(lambda: summed_loss(model, tokens)), rel=0.1)


@pytest.mark.parametrize("objective", ["kl", "kl-hidden"])
@pytest.mark.parametrize("shape", [{"intermediate_size": 192}, {"vocab_size": 3000}], ids=["wide", "vocabulary"])
def test_what_the_divergence_from_the_dense_model_allocates(shape: dict[str, int], objective: str) -> None:
    model = medium_model(**shape)
    (tokens,) = random_batches(windows=4, length=64, batches=1)
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"search.objective={objective}", "search.masks_per_step=4"))
    divergence = Divergence(Evaluator(sizes.model), float(objective == "kl-hidden"))
    masks = [keep_first(model, [(2, 190)] * 3)] * 4

    def step() -> None:
        divergence.values(masks, tokens, [{}] * 4, divergence.dense_states(tokens))

    seen, slices = peak(step), max(slice_bytes(sizes, block) for block in sizes.blocks)
    assert 0.9 * divergence_bytes(sizes, tokens) < seen < 1.05 * (divergence_bytes(sizes, tokens) + slices)


@pytest.mark.parametrize("method", ["none", "least-squares"])
@pytest.mark.parametrize("weights", ["full", "int8", "fp8"])
def test_a_pruned_forward_allocates_no_more_than_one_blocks_slices_on_top(weights: str, method: str) -> None:
    model = medium_model(intermediate_size=512)
    if weights != "full":
        quantize_projections(model, weights)
    keep = keep_first(model, [(1, 480)] * 3)
    (tokens,) = random_batches(windows=1, length=16, batches=1)
    blocks = {(index, "ffn"): RepairedBlock(torch.zeros(64, 480, dtype=torch.float64), None) for index in range(3)}
    sizes = Sizes(
        PrunableModel.of(model),
        medium_recipe(f"weight_format={weights}", "search.policy=units", f"repair.method={method}"),
    )
    expected = memory(sizes, Texts([], [], [], tokens, tokens))
    evaluator = Evaluator(PrunableModel.of(model))
    fp8 = 3 + 1 if method == "none" else 2 + 4
    assert expected.slices == 512 * 64 * {"full": 3 * 4, "int8": 3 * 4 + 1, "fp8": fp8}[weights]
    repaired = [{} if method == "none" else blocks] * 3
    seen = peak(lambda: evaluator.losses([keep] * 3, tokens, repaired))
    assert 0.9 * expected.slices < seen < 1.05 * (expected.slices + expected.activations)


@pytest.mark.parametrize("way", ["gathered", "reordered"])
@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_experts_are_copied_with_one_more_copy_of_a_tensor(architecture: str, way: str) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    for name, size in {"hidden_size": 256, "intermediate_size": 64, "moe_intermediate_size": 64}.items():
        setattr(config, name, size)
    model = PrunableModel.of(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    sizes = Sizes(model, medium_recipe("search.policy=units"))
    block = next(block for block in sizes.blocks if block.experts > 1)
    mask = torch.ones(block.experts, 64, dtype=torch.bool)
    mask[:, 0] = False
    shrinkable = ShrinkableBlock.of(model.family, model.layers[0], block.block)
    order = torch.arange(mask.numel()).flip(0)

    def gathered() -> None:
        shrinkable.shrink(mask.flatten(), None)

    def reordered() -> None:
        with elements_in_order(model, {(0, "ffn"): order}):
            pass

    seen = peak(gathered if way == "gathered" else reordered)
    assert seen == pytest.approx(slice_bytes(sizes, block), rel=0.05)


@pytest.mark.parametrize("weights", ["full", "int8", "fp8"])
@pytest.mark.parametrize("part", ["score", "width table", "repair"])
@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 384}, {"hidden_size": 128}], ids=str)
def test_what_is_solved_for_calibration(part: str, shape: dict[str, int], weights: str) -> None:
    model, text = medium_model(**shape), random_batches(windows=1)
    if weights != "full":
        quantize_projections(model, weights)
    channels = shape.get("intermediate_size", 192)
    keep = keep_first(model, [(1, channels // 2)] * 3)
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"weight_format={weights}"))
    made = unpacked_bytes(sizes)
    units = estimated_units(sizes.recipe, sizes.model.shape)
    ranks = ranks_of(sizes.model.shape, units)
    stays = table_bytes(sizes.model, units) if part == "width table" else 0
    seen = peak(
        {
            "score": lambda: score(PrunableModel.of(model), "obs", text, 0),
            "width table": lambda: dict(solve_layers(sizes.model, ranks, units, text, 1e-3, solve=True)),
            "repair": lambda: repair(PrunableModel.of(model), keep, text, "least-squares", 1e-3, reselect=True),
        }[part]
    )
    assert 0.8 * seen < solving_bytes(sizes) + made + stays < 1.6 * seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 384}, {"hidden_size": 128}], ids=str)
def test_what_the_fit_of_a_block_allocates(
    shape: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = medium_model(dtype, **shape), random_batches(windows=16, length=64)
    keep = keep_first(model, [(2, shape.get("intermediate_size", 192) - 4)] * 3)
    sizes = Sizes(PrunableModel.of(model), medium_recipe("repair.last_layers=0"))
    solve, peaks = SublayerFit.solve, []

    def count(fit: SublayerFit, start: Weights) -> Weights:
        solved: list[Weights] = []
        peaks.append(peak(lambda: solved.append(solve(fit, start))))
        return solved[0]

    monkeypatch.setattr(SublayerFit, "solve", count)
    made: list[BlockText] = []
    monkeypatch.setattr(BlockText, "__init__", recording(BlockText.__init__, made))
    repair(PrunableModel.of(model), keep, text, "sublayer", 1e-3, epochs=1)
    assert 0.9 < block_fit_bytes(sizes, 64) / max(peaks) < 1.2
    whole, states = Sizes(PrunableModel.of(model), medium_recipe()), tokens_in(text) * sizes.hidden * dtype.itemsize
    assert (predicted_bytes(whole, text), predicted_bytes(sizes, text)) == (3 * states, 0)
    held = sum(tensor.nbytes for tensor in (made[0].inputs, made[0].outputs, made[0].weights))
    assert block_text_bytes(sizes, text) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"vocab_size": 3000}], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_what_the_fit_of_the_last_layers_allocates(
    layers: int, shape: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = medium_model(dtype, **shape), random_batches(windows=16, length=64)
    keep = keep_first(model, [(2, 188), (2, 188), ((2, 3), 188)])
    sizes = Sizes(PrunableModel.of(model), medium_recipe(f"repair.last_layers={layers}"))
    solve, peaks = last_layers._Fit.solve, []

    def count(fit: object, start: Weights) -> Weights:
        solved: list[Weights] = []
        peaks.append(peak(lambda: solved.append(solve(fit, start))))
        return solved[0]

    monkeypatch.setattr(last_layers._Fit, "solve", count)
    repair(PrunableModel.of(model), keep, text, "sublayer", 1e-3, epochs=1, last_layers=layers)
    assert 0.9 < block_fit_bytes(sizes, 64) / max(peaks) < 1.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"vocab_size": 3000}, {"num_key_value_heads": 8}], ids=str)
def test_what_writing_text_allocates(shape: dict[str, int], dtype: torch.dtype) -> None:
    model, (tokens,) = medium_model(dtype, **shape), random_batches(windows=16, length=64, batches=1)
    every = torch.ones(model.config.vocab_size, dtype=torch.bool)
    seen = peak(lambda: list(sampled_batches(model, 0, every, [tuple(tokens.shape)], 0)))
    assert 0.9 < sampling_bytes(Sizes(PrunableModel.of(model), medium_recipe()), [tokens]) / seen < 1.3


def recording(make: Callable[..., None], made: list[BlockText]) -> Callable[..., None]:
    def init(self: BlockText, *arguments: object) -> None:
        make(self, *arguments)
        made.append(self)

    return init


def test_the_table_holds_what_it_is_said_to_hold() -> None:
    model, text = PrunableModel.of(medium_model()), random_batches()
    units = estimated_units(medium_recipe(), model.shape)
    layers = solve_layers(model, ranks_of(model.shape, units), units, text, 1e-3, solve=True)
    held = sum(weight.nbytes for _, blocks in layers for block in blocks.values() for weight in block.weights.values())
    assert table_bytes(model, units) == held


def test_weights_are_counted_once_where_they_are_tied() -> None:
    for tied in (True, False):
        model = medium_model(torch.bfloat16, tie_word_embeddings=tied)
        (text,) = random_batches(batches=1)
        storages = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in model.parameters()}
        assert memory(Sizes(PrunableModel.of(model), medium_recipe()), Texts([], [], [], text, text)).weights == sum(
            storages.values()
        )


def test_what_a_recipe_does_not_do_takes_no_memory() -> None:
    text = random_batches()
    texts = Texts(text, text, text, text[0], text[1])

    def needed(*overrides: str) -> Memory:
        return memory(Sizes(PrunableModel.of(medium_model()), medium_recipe(*overrides)), texts)

    bare = needed("search.policy=units", "repair.method=none", "scores.metric=magnitude")
    assert (bare.covariances, bare.gradients, bare.hidden_states, bare.width_table) == (0, 0, 0, 0)
    assert bare.block_fit == needed("repair.method=least-squares").block_fit == 0
    assert bare.host == 0
    assert needed("repair.method=none").repaired_weights == 0
    assert bare.device == bare.weights + bare.activations + bare.slices
    flap = needed("search.policy=units", "repair.method=none", "scores.metric=flap")
    assert (flap.covariances, flap.hidden_states) == (0, 2 * 4 * 16 * 64 * 4)
    taylor = needed("search.policy=units", "repair.method=none", "scores.metric=taylor")
    assert taylor.gradients > sum(p.nbytes for p in medium_model().model.layers.parameters()) * 0.95
    assert taylor.device == taylor.weights + max(taylor.activations + taylor.slices, taylor.gradients)
    whole = needed()
    assert min(whole.covariances, whole.block_fit, whole.hidden_states, whole.width_table) > 0
    closed = needed("repair.method=least-squares")
    assert whole.hidden_states == closed.hidden_states + 2 * 4 * 16 * (2 * 64 * 4 + 4)
    assert (whole.dense_states, closed.dense_states) == (3 * 2 * 4 * 16 * 64 * 4, 0)
    assert needed("search.objective=kl").dense_states == whole.dense_states + 4 * 16 * 64 * 4
    assert whole.written_widths == 3 * whole.width_table // 3  # one layer, its file, and the next layer
    layers = medium_model().model.layers
    assert whole.repaired_weights == pytest.approx(0.5 * sum(p.nbytes for p in layers.parameters()), rel=0.01)
    assert closed.repaired_weights == 0.5 * 3 * (64 * 64 + 64 * 192) * 4
    assert whole.host == whole.hidden_states + whole.dense_states + max(whole.written_widths, whole.repaired_weights)


def test_repaired_projections_take_what_is_said() -> None:
    model, text = PrunableModel.of(medium_model()), random_batches(windows=16, length=64)
    keep = keep_first(model.module, [(1, 96)] * 3)
    repaired = repair(model, keep, text, "least-squares", 1e-3).blocks.values()
    held = sum(tensor.nbytes for block in repaired for tensor in block.tensors)
    assert repaired_bytes(Sizes(model, medium_recipe("repair.method=least-squares"))) == held


def test_a_backward_pass_takes_what_is_said() -> None:
    model = medium_model(num_hidden_layers=6)
    (text,) = random_batches(windows=4, length=32, batches=1)
    sizes = Sizes(PrunableModel.of(model), medium_recipe("scores.metric=taylor"))
    expected = memory(sizes, Texts([text], [], [], text, text)).gradients
    assert 0.6 * expected < peak(lambda: score(PrunableModel.of(model), "taylor", [text], 0)) < 1.2 * expected
