"""The only place that runs the model: how much does it lose under these masks?

A mask is evaluated on the **shrunk** model. Just before a block runs, the kept rows and columns of its projections are
gathered into smaller matrices; just after, the dense ones are back. So the cost falls with the sparsity, memory grows
by one block's slices only, and the result equals the dense model's with the removed units' outputs set to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.model.prunable import Block, ModelMask, Output, Outputs, Projection, Shape, gather_units
from pgprune_cli.model.quantized import Int8Linear, QuantizedLinear, Rows

LOGIT_ROWS = 512
"""Positions whose logits exist at a time: of a 128k vocabulary 131 MB in bfloat16."""

SOFTMAX_ROWS = 64
"""Of these, at a time in float32, and as many for their log-softmax: few enough for the caches of a CPU."""


@torch.inference_mode()
def summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss of a causal model, summed over all predictions in `tokens` `(B, T)`: a float32 scalar, nats.

    Logits exist for a few hundred positions at a time only, and nothing waits for the device.
    """
    with _one_window_a_row():
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = tokens[:, 1:].reshape(-1).to(rows.device)
    total = torch.zeros((), device=rows.device, dtype=torch.float32)
    for some, wanted in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        total += _cross_entropy(head(some), wanted)
    return total


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over `(rows, vocabulary)` in any dtype: a float32 scalar. Lets go of the logits before the next are."""
    total = torch.zeros((), device=logits.device, dtype=torch.float32)
    # Made once: with small tensors made in between, a heap would be left full of holes of this size.
    buffers = logits.new_empty(2, min(SOFTMAX_ROWS, len(logits)), logits.shape[1], dtype=torch.float32)
    for some, wanted in zip(logits.split(SOFTMAX_ROWS), targets.split(SOFTMAX_ROWS), strict=True):
        full, logs = buffers[:, : len(some)]
        torch.log_softmax(full.copy_(some), -1, out=logs)
        total += functional.nll_loss(logs, wanted, reduction="sum")
    return total


@contextmanager
def _one_window_a_row() -> Iterator[None]:
    """Inside, transformers takes a row of tokens for one window. Else it reads that off the positions in each forward,
    which on a GPU keeps the host waiting for all that it has launched."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    known = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, known)


class NoAttention(nn.Module):
    """Stands for an attention block that lost all its heads: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Stands for an FFN block that lost all its channels."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class Evaluator:
    """Losses of a causal language model under masks. Changes nothing of the model that outlives a call.

    Where memory runs out, a batch goes through in `portions` from then on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shape = Shape.of(model)
        self.layers = model.get_submodule(self.shape.spec.layers)
        self.input_device = model.get_input_embeddings().weight.device
        self.portions = BatchSplitter()

    def losses(self, keeps: Sequence[ModelMask], tokens: Tensor, outputs: Sequence[Outputs] | None = None) -> Tensor:
        """Mean next-token loss on `tokens` `(B, T)` int64 under each of K decisions: `(K,)` float64, nats per token.

        `outputs` holds the repaired projections of each decision. A loss that overflows comes back as it is (inf or
        NaN); the caller decides. Raises RunError where the memory does not suffice for one window.
        """
        tokens = tokens.to(self.input_device)
        pairs = zip(keeps, outputs or [{} for _ in keeps], strict=True)
        results = [self._summed(keep, tokens, repaired) for keep, repaired in pairs]
        if not results:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack(results).cpu() / (tokens.shape[0] * (tokens.shape[1] - 1))

    def _summed(self, keep: ModelMask, tokens: Tensor, outputs: Outputs) -> Tensor:
        """The loss of one decision over all predictions: a float64 scalar on the model's device."""
        parts: list[Tensor] = []

        def run(some: slice) -> None:
            # Shrunk anew for each: where gathering itself ran out of memory, the block is half swapped.
            with self.shrunk(keep, outputs):
                parts.append(summed_loss(self.model, tokens[some]))

        self.portions.each(len(tokens), run)
        return torch.stack(parts).double().sum()

    @contextmanager
    def shrunk(self, keep: ModelMask, outputs: Outputs | None = None) -> Iterator[nn.Module]:
        """The model, shrunk to `keep` inside the `with`, and dense again on every way out of it."""
        with ExitStack() as undo:
            for index, (layer, kept) in enumerate(zip(self.layers, keep, strict=True)):
                for name, block in self.shape.spec.blocks():
                    output = (outputs or {}).get((index, name))
                    undo.enter_context(shrunk_block(layer, name, block, kept.of(name), output))
            yield self.model


def shrunk_block(
    layer: nn.Module, name: str, block: Block, mask: Tensor, output: Output | None
) -> AbstractContextManager[None]:
    """One block of a layer on its kept units inside the `with`, its output projection repaired where one is given."""
    if mask.any():
        module = layer.get_submodule(block.module)
        as_it_is = mask.all() and output is None
        # int8 weights are made usable where the others are gathered, which no latency counts
        if as_it_is and not isinstance(module.get_submodule(block.output.name), Int8Linear):
            return nullcontext()
        return _gathered(module, block, mask, output)
    return _replaced(layer, block.module, NoAttention() if name == "attention" else NoFeedForward())


def _sent(index: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device. What a GPU reads from pinned memory the host need not wait for."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)


def _kept_weight(linear: nn.Module, projection: Projection, kept: Tensor, units: int) -> Tensor | Rows:
    if isinstance(linear, QuantizedLinear):
        return linear.gathered(projection.axis, kept, units)
    return gather_units(linear.weight.data, projection.axis, kept, units)


@contextmanager
def _replaced(layer: nn.Module, name: str, stub: nn.Module) -> Iterator[None]:
    dense = layer.get_submodule(name)
    setattr(layer, name, stub)
    try:
        yield
    finally:
        setattr(layer, name, dense)


@contextmanager
def _gathered(module: nn.Module, block: Block, mask: Tensor, output: Output | None) -> Iterator[None]:
    """While inside, every forward of `module` runs on the kept units of its projections."""
    linears = [(module.get_submodule(projection.name), projection) for projection in block.projections]
    kept = _sent(mask.nonzero().squeeze(1), next(module.parameters()).device)
    undo: list[Callable[[], None]] = []

    def put(linear: nn.Module, key: str, value: Tensor | Rows) -> None:
        if key == "weight" and isinstance(linear, QuantizedLinear):
            undo.append(partial(setattr, linear, "kept", None))
            linear.kept = value
            return
        parameter = getattr(linear, key)
        if parameter is None:  # a bias that the repair brings and the dense model has not
            undo.append(partial(setattr, linear, key, None))
            setattr(linear, key, nn.Parameter(value, requires_grad=False))
        else:
            undo.append(partial(setattr, parameter, "data", parameter.data))
            parameter.data = value

    def gather(*_: object) -> None:
        for linear, projection in linears:
            if output is not None and projection == block.output:
                for key, value in zip(("weight", "bias"), output, strict=True):
                    if value is not None:
                        dtype = linear.dtype if isinstance(linear, QuantizedLinear) else linear.weight.dtype
                        put(linear, key, value.to(kept.device, dtype, non_blocking=True))
                continue
            put(linear, "weight", _kept_weight(linear, projection, kept, len(mask)))
            if projection.axis == 0 and linear.bias is not None:
                put(linear, "bias", gather_units(linear.bias.data, 0, kept, len(mask)))

    def restore(*_: object) -> None:
        while undo:
            undo.pop()()

    # always_call: the dense weights come back even when the forward raises.
    handles = [module.register_forward_pre_hook(gather), module.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore()
