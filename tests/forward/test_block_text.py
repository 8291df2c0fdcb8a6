"""What a dense block reads and writes, and a block that runs on other weights, against forward passes of the model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.blocks import model_unchanged, observed_inputs
from helpers.fits import read_block, windows
from helpers.masks import dense_except, random_repair
from helpers.models import tiny_model
from torch import Tensor, nn

from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections

BLOCKS = [(1, "attention"), (3, "attention"), (2, "ffn")]
"""Layer 3 has full attention in models whose other layers have a sliding window or a recurrent state."""

PRUNED = {"attention": (2, (1 << 20, 1 << 20)), "ffn": (4, 9)}
"""What the block of that name loses."""


def close(got: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def read_and_written(
    model: nn.Module, index: int, name: str, mask: ModelMask | None = None, repaired: RepairedBlocks | None = None
) -> tuple[Tensor, Tensor]:
    """Return the inputs and outputs of a block in whole forward passes on all windows, shrunk to a mask if given."""
    prunable, seen = PrunableModel.of(model), []
    module = prunable.layers[index].get_submodule(prunable.shape.blocks[index][name].module)

    def see(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen.append((inputs, output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(see, with_kwargs=True)
    mask = dense_except(model, index, 4, (1 << 20, 1 << 20)) if mask is None else mask
    with torch.no_grad(), Evaluator(prunable).shrunk(mask, repaired):
        for tokens in windows():
            model(input_ids=tokens, use_cache=False)
    handle.remove()
    inputs, outputs = zip(*seen, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


def test_a_text_is_freed_with_its_last_reference() -> None:
    """It is as large as the hidden states, so it must not wait for the garbage collector."""
    gc.disable()
    try:
        read = read_block(tiny_model("llama-gqa"), 1, "ffn")
        text = weakref.ref(read.text)
        assert text() is not None
        del read
        assert text() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("index", "name"), BLOCKS)
def test_text_of_a_block_is_what_the_model_reads_and_writes(architecture: str, index: int, name: str) -> None:
    model = tiny_model(architecture)
    with model_unchanged(model):
        text = read_block(model, index, name).text
    inputs, outputs = read_and_written(model, index, name)
    close(text.inputs, inputs)
    close(text.outputs, outputs)
    close(text.weights.double().flatten(), observed_inputs(model, index, name, windows())[1])


@pytest.mark.parametrize(("index", "name"), BLOCKS)
def test_block_on_its_kept_weights_equals_the_shrunk_block(architecture: str, index: int, name: str) -> None:
    check_kept_weights(tiny_model(architecture), index, name)


@pytest.mark.parametrize("architecture", ["llama-gqa", "phi3", "qwen3_5_text"])
@pytest.mark.parametrize(("index", "name"), BLOCKS)
def test_block_of_rounded_weights_equals_the_shrunk_block(architecture: str, index: int, name: str) -> None:
    model = tiny_model(architecture)
    quantize_projections(model, "int8")
    check_kept_weights(model, index, name)


def check_kept_weights(model: nn.Module, index: int, name: str) -> None:
    mask = dense_except(model, index, *PRUNED[name])
    with model_unchanged(model):
        read = read_block(model, index, name)
        own = mask[index].of(name)
        got = read.runner(own).output(read.weights(own), read.text.inputs[:3])
        whole = read.runner(torch.ones_like(own)).output(read.weights(torch.ones_like(own)), read.text.inputs[:3])
    close(got, read_and_written(model, index, name, mask)[1][:3])
    close(whole, read.text.outputs[:3])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("index", "name"), BLOCKS)
def test_block_on_refitted_weights_equals_the_repaired_block(index: int, name: str, quantized: bool) -> None:
    model = tiny_model("qwen2")
    if quantized:
        quantize_projections(model, "int8")
    mask = dense_except(model, index, *PRUNED[name])
    read, own = read_block(model, index, name), mask[index].of(name)
    plain = tiny_model("qwen2")
    repaired = random_repair(plain, mask, False)[index, name]
    output = read.model.family.unit_tensors(read.layer, read.block)[-1].name
    weights = read.weights(own) | dict(repaired.inner) | {output: repaired.weight}
    got = read.runner(own).output(weights, read.text.inputs)
    close(got, read_and_written(model, index, name, mask, {(index, name): repaired})[1])


@pytest.mark.parametrize("architecture", ["llama-biased", "gemma2", "qwen3_5_text"])
@pytest.mark.parametrize(("index", "name"), BLOCKS)
def test_block_of_a_float16_model_also_runs_in_float32(architecture: str, index: int, name: str) -> None:
    model = tiny_model(architecture).half()
    with model_unchanged(model):
        read = read_block(model, index, name)
        mask = torch.ones(read.model.shape.grids[name][index].elements, dtype=torch.bool)
        weights = {key: weight.float() for key, weight in read.weights(mask).items()}
        got = read.runner(mask).output(weights, read.text.inputs.float())
    assert got.dtype == torch.float32
    close(got, read.text.outputs.float(), rtol=2e-2)
