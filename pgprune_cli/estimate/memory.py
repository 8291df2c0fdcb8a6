"""The bytes that a search needs at most, counted tensor by tensor along the code that allocates them.

The formulas say how many of the largest tensors exist at the same time. A test compares each with the allocations of a
running model. What an allocator wastes and what CUDA itself takes come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pgprune_cli.estimate.sizes import BlockSizes, Sizes, Texts, tokens_in
from pgprune_cli.forward.divergence import MASKS, ROWS, stream_places
from pgprune_cli.forward.masked import LOGIT_ROWS, SOFTMAX_ROWS
from pgprune_cli.forward.short_attention import LONGEST
from pgprune_cli.repair.last_layers import ROWS as LAST_ROWS
from pgprune_cli.repair.last_layers import last_layers_batches, tokens_at_once
from pgprune_cli.repair.training import TOKENS_PER_STEP, compute_dtype
from pgprune_cli.repair.width_table import table_bytes
from pgprune_cli.search.costs import kv_cache


@dataclass(frozen=True)
class Memory:
    """Bytes.

    On the device: weights; activations of one forward pass with its logits; slices of one block; covariances of one
    layer, with the matrices they are solved in; block_fit, the fit of one block or of the last layers, if whole blocks
    are fitted; gradients of the metric `taylor`, with everything that a backward pass keeps. In the host's memory:
    hidden_states of the calibration text, and what fits of whole blocks read, unless a device has room for them;
    dense_states, those of the dense model that losses and the last layers are compared with, and the inputs of these
    layers; written_widths, one layer's repaired projections of all widths and their file while it is written, and
    those of the next layer; repaired_weights of all blocks, after the steps. On disk: width_table, the projections of
    all layers. During the steps, as many as fit beside a forward pass are on the GPUs; the others are in the system's
    file cache as far as there is room.
    """

    weights: int
    activations: int
    slices: int
    covariances: int
    block_fit: int
    gradients: int
    hidden_states: int
    dense_states: int
    written_widths: int
    repaired_weights: int
    width_table: int

    @property
    def device(self) -> int:
        """What the device needs at the most demanding moment: a step, or the calibration before and after the steps."""
        return self.weights + max(self.activations + self.slices, self.covariances, self.block_fit, self.gradients)

    @property
    def host(self) -> int:
        """What the host needs besides. On a CPU, host and device share one memory."""
        return self.hidden_states + self.dense_states + max(self.written_widths, self.repaired_weights)


def memory(sizes: Sizes, texts: Texts, *, solves: bool = True) -> Memory:
    """Return the bytes that a search needs at most. solves: whether equations are solved on the device."""
    fits = sizes.has_table or sizes.repairs
    layerwise = texts.scoring if sizes.scores_on_text and sizes.statistic != "gradients" else []
    table_text, repair_text = (texts.table if sizes.has_table else []), (texts.repair if sizes.repairs else [])
    fitted = [*table_text, *repair_text]
    table = table_bytes(sizes.model, sizes.partitions, sizes.multiples) if sizes.has_table and sizes.solves else 0
    largest = max((batch.numel() for batch in [*layerwise, *fitted]), default=0)
    context = max(batch.shape[1] for batch in [*layerwise, *fitted, texts.step])
    solved = fits or sizes.statistic == "covariance"
    state = sizes.hidden * sizes.dtype.itemsize
    return Memory(
        weights=sum(parameter.nbytes for parameter in sizes.model.module.parameters()),
        activations=max(
            layer_bytes(sizes, max(largest, texts.step.numel()), context),
            logit_bytes(sizes, texts.step),
            divergence_bytes(sizes, texts.step),
            sampling_bytes(sizes, texts.sampled),
        ),
        slices=max(slice_bytes(sizes, block) for block in sizes.blocks),
        covariances=max(solving_bytes(sizes) if solves else 0, observing_bytes(sizes, largest)) + unpacked_bytes(sizes)
        if solved
        else 0,
        block_fit=block_fit_bytes(sizes, context) if sizes.fits_blocks else 0,
        gradients=backward_bytes(sizes, texts.scoring[0]) if sizes.statistic == "gradients" else 0,
        hidden_states=max(map(tokens_in, (layerwise, table_text, repair_text))) * state
        + (block_text_bytes(sizes, repair_text) if sizes.fits_blocks else 0),
        dense_states=dense_states(sizes) * texts.heldout.numel() * state + predicted_bytes(sizes, repair_text),
        written_widths=3 * table // sizes.layers,
        repaired_weights=repaired_bytes(sizes),
        width_table=table,
    )


def layer_bytes(sizes: Sizes, tokens: int, context: int) -> int:
    """Return the bytes of a forward pass through dense layers, in windows of `context` tokens.

    That is what exists at the same time in the widest block, or while the inputs of an output projection are rounded to
    fp8 through float32.
    """
    hidden, family, itemsize = sizes.hidden, sizes.model.family, sizes.dtype.itemsize
    per_token = [
        family.activation_width(block.block, hidden, block.inner, block.inputs) * itemsize
        + score_bytes(sizes, block, context)
        for block in sizes.blocks
    ]
    if sizes.recipe.weight_format == "fp8":
        per_token += [(4 * hidden + block.inputs) * itemsize + 5 * block.inputs for block in sizes.blocks]
    return tokens * max(per_token)


def score_bytes(sizes: Sizes, block: BlockSizes, context: int) -> int:
    """Return the bytes per token of attention scores that exist as a whole, as with soft-capping, 0 otherwise.

    The softmax is float32, and so is its argument.
    """
    if block.block != sizes.model.family.attention or sizes.model.config._attn_implementation != "eager":
        return 0
    itemsize = sizes.dtype.itemsize
    return block.elements * context * (2 * itemsize if itemsize == 4 else itemsize + 8)


def fit_score_bytes(sizes: Sizes, block: BlockSizes, context: int) -> int:
    """Return the bytes per token of attention scores and their gradients in a fit.

    On a CPU they exist in short windows in any case (forward/short_attention.py). On a GPU they don't, so there this is
    a little too much.
    """
    in_short_windows = block.block == sizes.model.family.attention and context <= LONGEST
    plain = block.elements * context * compute_dtype(sizes.dtype).itemsize if in_short_windows else 0
    return max(3 * score_bytes(sizes, block, context), plain)


def logit_bytes(sizes: Sizes, tokens: Tensor) -> int:
    """Return the bytes of the loss: some rows of logits, part of them in float32 with their log-softmax, the hidden
    states and their copy."""
    rows = min(LOGIT_ROWS, tokens.shape[0] * (tokens.shape[1] - 1))
    in_float32 = 8 * min(SOFTMAX_ROWS, rows)
    return (
        rows * sizes.dtype.itemsize + in_float32
    ) * sizes.vocabulary + 2 * tokens.numel() * sizes.hidden * sizes.dtype.itemsize


def dense_states(sizes: Sizes) -> int:
    """Return how many hidden states of the dense model are kept for a token, as the objective needs them."""
    objective = sizes.recipe.search.objective
    return 0 if objective == "loss" else 1 + (len(stream_places(sizes.layers)) if objective == "kl-hidden" else 0)


def divergence_bytes(sizes: Sizes, tokens: Tensor) -> int:
    """Return the bytes of the divergence from the dense model, 0 if the objective does not need it.

    Kept are the hidden states of the dense model and of some masks. To them comes a forward pass, and later the logits:
    some rows of the dense model in float32, of one mask, and part of both with their log-softmax.
    """
    if not (kept := dense_states(sizes)):
        return 0
    state = tokens.numel() * sizes.hidden * sizes.dtype.itemsize
    masks = min(MASKS, sizes.recipe.search.masks_per_step)
    rows = min(ROWS, tokens.shape[0] * (tokens.shape[1] - 1))
    logits = (rows * (4 + sizes.dtype.itemsize) + 8 * min(SOFTMAX_ROWS, rows)) * sizes.vocabulary
    forward = layer_bytes(sizes, tokens.numel(), tokens.shape[1]) + kept * state
    return (kept + masks) * state + max(forward, logits)


def sampling_bytes(sizes: Sizes, batches: Sequence[Tensor]) -> int:
    """Return the bytes that writing a batch of text takes.

    They are the KV cache, a layer's part of which is copied when it grows, and the logits of one token of every window,
    with their softmax and its sums in float64.
    """
    logit = sizes.dtype.itemsize + 28
    return max(
        (len(batch) * (window_cache_bytes(sizes, batch.shape[1]) + logit * sizes.vocabulary) for batch in batches),
        default=0,
    )


def window_cache_bytes(sizes: Sizes, tokens: int) -> int:
    """Return the bytes of the KV cache of one window, and those of a layer once more."""
    whole = sizes.model.shape.cost(kv_cache(sizes.model, tokens))
    return whole + whole // sizes.layers


def slice_bytes(sizes: Sizes, block: BlockSizes) -> int:
    """Return the bytes of the slices of a block that keeps nearly everything.

    int8 also needs the unpacked weights of one projection. fp8 multiplies the rounded values themselves, except in a
    repaired output projection.
    """
    if sizes.recipe.weight_format == "fp8":
        repaired = block.inputs * block.outputs * (sizes.dtype.itemsize - 1) if sizes.repairs else 0
        return block.nbytes // sizes.dtype.itemsize + max(block.largest, repaired)
    # First the experts are gathered, then their channels: two copies of one tensor, the others exist once.
    gathered_twice = block.nbytes // 3 if block.experts > 1 else 0
    return block.nbytes + gathered_twice + (block.largest if sizes.recipe.weight_format == "int8" else 0)


def unpacked_bytes(sizes: Sizes) -> int:
    """Return the bytes of a block's weights unpacked from rounded ones while it is scored."""
    if sizes.recipe.weight_format == "full":
        return 0
    return max(block.nbytes + block.largest for block in sizes.blocks)


def solving_bytes(sizes: Sizes) -> int:
    """Return the bytes of solving: four float32 matrices `(in, in)`, and some of the size of the weights or of R.

    Where float32 does not suffice, which needs inputs that are all but collinear, it is twice that.
    """
    inputs, hidden = max(block.inputs for block in sizes.blocks), sizes.hidden
    return 4 * (4 * inputs**2 + 4 * inputs * hidden + 3 * hidden**2) + expert_moment_bytes(sizes)


def observing_bytes(sizes: Sizes, tokens: int) -> int:
    """Return the bytes of adding a batch: float32 sums, most of a matrix of products, float32 and rounded inputs."""
    inputs = max(block.experts_per_token * block.inputs for block in sizes.blocks)
    products = max(block.inputs for block in sizes.blocks if block.experts == 1) ** 2
    return (
        expert_moment_bytes(sizes)
        + 8 * products
        + tokens * (6 * inputs + (inputs + 4 * sizes.hidden) * sizes.dtype.itemsize)
    )


def block_text_bytes(sizes: Sizes, batches: Sequence[Tensor]) -> int:
    """Return the bytes of what one block reads and writes, with a float32 weight per token."""
    return tokens_in(batches) * (2 * sizes.hidden * sizes.dtype.itemsize + 4)


def predicted_bytes(sizes: Sizes, batches: Sequence[Tensor]) -> int:
    """Return the bytes of the hidden states that the last layers are fitted to: those of the dense model, which exist
    twice in the end, and the inputs of the first of these layers."""
    if not sizes.last_blocks or not batches:
        return 0
    tokens = tokens_in([batches[index] for index in last_layers_batches(batches)])
    return 3 * tokens * sizes.hidden * sizes.dtype.itemsize


def repaired_bytes(sizes: Sizes) -> int:
    """Return the bytes of the repaired weights of all blocks: of whole blocks if they are fitted, else of their output
    projections."""
    total = 0.0
    for block in sizes.blocks:
        if block.keep_fraction < 1 and sizes.repairs:
            output = block.experts * block.inputs * block.outputs * sizes.dtype.itemsize
            total += block.keep_fraction * (block.nbytes if sizes.fits_blocks and block.experts == 1 else output)
    return round(total)


def block_fit_bytes(sizes: Sizes, context: int) -> int:
    """Return the bytes of fitting a block that keeps nearly everything, in steps of windows of `context` tokens.

    Per parameter: weights, gradients and two means in float32; the first, the best and the newest weights as they are
    stored; weights and gradients in the dtype of the computation, if that is not float32. Per token: what the block
    reads and writes, its error, and every activation inside it with its gradient, a little more than twice. The last
    layers are fitted together, with gradients inside one of them at a time, or, before these exist, with some rows of
    both models' logits and their gradient, a few of them in float32.
    """
    stored, computed = sizes.dtype.itemsize, compute_dtype(sizes.dtype).itemsize
    tokens = max(TOKENS_PER_STEP, context)
    per_parameter = 16 + 3 * stored + (2 * computed if computed < 4 else 0)

    def trained(block: BlockSizes) -> int:
        return block.nbytes // stored * per_parameter

    def activations(block: BlockSizes) -> int:
        per_token = 9 * sum((*block.inner, block.inputs)) * computed // 4 + sizes.hidden * (6 + 2 * computed)
        return per_token + fit_score_bytes(sizes, block, context)

    one = max((trained(block) + tokens * activations(block) for block in sizes.blocks if block.experts == 1), default=0)
    layers = [sum(map(activations, layer)) for layer in sizes.last_layers]
    at_once = max(tokens_at_once(len(layers)), context) if layers else 0
    whole = sum(map(trained, sizes.last_blocks)) + at_once * (sum(layers) + max(layers, default=0)) // 2
    logits = sizes.vocabulary * (3 * stored * LAST_ROWS + 4 * 4 * SOFTMAX_ROWS) if whole else 0
    return max(one, whole, 3 * whole // 5 + logits, layer_bytes(sizes, tokens, context))


def expert_moment_bytes(sizes: Sizes) -> int:
    """Return the bytes of the float32 moments of all experts of a layer."""
    return max((4 * block.experts * block.inputs**2 for block in sizes.blocks if block.experts > 1), default=0)


def backward_bytes(sizes: Sizes, tokens: Tensor) -> int:
    """Return the bytes of a backward pass: gradients, activations of all layers, logits and their gradient."""
    weights = sum(block.nbytes for block in sizes.blocks)
    logits = tokens.numel() * sizes.vocabulary * (8 + sizes.dtype.itemsize)
    return weights + sizes.layers * layer_bytes(sizes, tokens.numel(), tokens.shape[1]) + logits
