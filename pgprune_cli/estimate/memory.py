"""Bytes that a search needs, at most: counted after the code that allocates them, tensor by tensor.

The formulas say how many of the largest tensors exist at a time; a test holds each against the allocations of a model
that runs. What an allocator wastes and what CUDA itself takes come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pgprune_cli.estimate.sizes import Block, Sizes, Texts, tokens_in
from pgprune_cli.forward.masked import LOGIT_ROWS, SOFTMAX_ROWS


@dataclass(frozen=True)
class Memory:
    """Bytes. On the device: weights; activations of one forward, its logits with them; slices of one block;
    covariances of one layer, with what they are solved in; gradients of the metric taylor, with all that a backward
    pass keeps. In the host's memory: hidden states of the calibration text; one layer's repaired projections of all
    widths, and their file as it is written. On disk: those of all layers (which go to a GPU as long as half of it is
    free, and stay in the system's cache of files as far as there is room).
    """

    weights: int
    activations: int
    slices: int
    covariances: int
    gradients: int
    hidden_states: int
    written_widths: int
    width_table: int

    @property
    def device(self) -> int:
        """At the most demanding moment: a step of the search, or the calibration before and after it."""
        return self.weights + max(self.activations + self.slices, self.covariances, self.gradients)

    @property
    def host(self) -> int:
        """Besides the device's; on a CPU both are of the same memory."""
        return self.hidden_states + self.written_widths


def memory(sizes: Sizes, texts: Texts) -> Memory:
    fits = sizes.has_table or sizes.repairs
    streamed = texts.scoring if sizes.scores_on_text and sizes.statistic != "gradients" else []
    fitted = texts.fitting if fits else []
    table = table_bytes(sizes) if sizes.has_table and sizes.solves else 0
    largest = max((batch.numel() for batch in [*streamed, *fitted]), default=0)
    solved = fits or sizes.statistic == "covariance"
    return Memory(
        weights=sum(parameter.nbytes for parameter in sizes.model.parameters()),
        activations=max(layer_bytes(sizes, max(largest, texts.step.numel())), logit_bytes(sizes, texts.step)),
        slices=max(slice_bytes(sizes, block) for block in sizes.blocks),
        covariances=max(solving_bytes(sizes), watching_bytes(sizes, largest)) + made_bytes(sizes) if solved else 0,
        gradients=backward_bytes(sizes, texts.scoring[0]) if sizes.statistic == "gradients" else 0,
        hidden_states=max(tokens_in(streamed), tokens_in(fitted)) * sizes.hidden * sizes.dtype.itemsize,
        written_widths=2 * table // sizes.layers,
        width_table=table,
    )


def layer_bytes(sizes: Sizes, tokens: int) -> int:
    """Of a forward through dense layers: what is in scope at a time in transformers' Llama, in its widest block; or
    while the inputs of an output projection are rounded to fp8, through float32."""
    hidden, widths = sizes.hidden, []
    for block in sizes.blocks:
        if block.name == "attention":  # while queries or keys are rotated
            queries, keys = block.inner[0], block.inner[1]
            widths.append(3 * hidden + max(4 * queries + 2 * keys, 2 * queries + 5 * keys))
        else:
            widths.append(4 * hidden + 3 * block.inputs)
    rounded = [(4 * hidden + block.inputs) * sizes.dtype.itemsize + 5 * block.inputs for block in sizes.blocks]
    return tokens * max(max(widths) * sizes.dtype.itemsize, *(rounded if sizes.recipe.weight_format == "fp8" else [0]))


def logit_bytes(sizes: Sizes, tokens: Tensor) -> int:
    """Of the loss: logits of some rows, of some of them in float32 and their log-softmax, beside the hidden states and
    their copy."""
    rows = min(LOGIT_ROWS, tokens.shape[0] * (tokens.shape[1] - 1))
    in_float32 = 8 * min(SOFTMAX_ROWS, rows)
    return (
        rows * sizes.dtype.itemsize + in_float32
    ) * sizes.vocabulary + 2 * tokens.numel() * sizes.hidden * sizes.dtype.itemsize


def slice_bytes(sizes: Sizes, block: Block) -> int:
    """Of a block that keeps nearly all; rounded weights of one projection besides, while what stands for it is made.

    Of fp8 the values themselves are multiplied, but for the output projection where it is repaired.
    """
    if sizes.recipe.weight_format == "fp8":
        repaired = block.inputs * block.outputs * (sizes.dtype.itemsize - 1) if sizes.repairs else 0
        return block.nbytes // sizes.dtype.itemsize + max(block.largest, repaired)
    return block.nbytes + (block.largest if sizes.recipe.weight_format == "int8" else 0)


def made_bytes(sizes: Sizes) -> int:
    """Of a block's weights that are made of rounded ones, and outlive what they are made for: its scoring."""
    if sizes.recipe.weight_format == "full":
        return 0
    return max(block.nbytes + block.largest for block in sizes.blocks)


def solving_bytes(sizes: Sizes) -> int:
    """Four float64 matrices `(in, in)` at a time, and what has the size of weights or of R."""
    inputs, hidden = max(block.inputs for block in sizes.blocks), sizes.hidden
    return 8 * (4 * inputs**2 + 3 * inputs * hidden + 3 * hidden**2)


def watching_bytes(sizes: Sizes, tokens: int) -> int:
    """While a batch is added: sums in float64, its products in both precisions, its inputs in float32, weighted too."""
    inputs = max(block.inputs for block in sizes.blocks)
    return 20 * inputs**2 + tokens * (8 * inputs + (inputs + 4 * sizes.hidden) * sizes.dtype.itemsize)


def backward_bytes(sizes: Sizes, tokens: Tensor) -> int:
    """As much as the prunable weights, the activations of every layer, all logits and their gradient in float32."""
    weights = sum(block.nbytes for block in sizes.blocks)
    logits = tokens.numel() * sizes.vocabulary * (8 + sizes.dtype.itemsize)
    return weights + sizes.layers * layer_bytes(sizes, tokens.numel()) + logits


def table_bytes(sizes: Sizes) -> int:
    """Every block's output projection at every width between none and all of its units."""
    kept = [(block, sum(range(0, block.units, block.level))) for block in sizes.blocks]
    return sum(units * block.inputs // block.units * block.outputs for block, units in kept) * sizes.dtype.itemsize
