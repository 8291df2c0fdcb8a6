"""Where a mask is applied: the loss of the model that a mask leaves.

A mask is evaluated on the **shrunk** model (see shrunk_block.py), so the cost falls with the sparsity, and the result
equals that of the dense model with the outputs of the removed units set to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.element_order import ElementOrders, elements_in_order
from pgprune_cli.forward.shrunk_block import ShrinkableBlock
from pgprune_cli.forward.uploads import Upload, Uploads
from pgprune_cli.model.families import find_family
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel

LOGIT_ROWS = 512
"""Positions whose logits exist at the same time: 131 MB in bfloat16 for a vocabulary of 128k."""

SOFTMAX_ROWS = 64
"""How many of them exist in float32, with their log-softmax: few enough for the caches of a CPU."""

NOTHING_COMES: Mapping[tuple[int, str], Upload] = {}


@torch.inference_mode()
def summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the next-token loss of a causal model summed over all predictions in `tokens` `(B, T)`.

    A float32 scalar, in nats. Logits exist for a few hundred positions at a time, and nothing waits for the device.
    """
    causal: Any = model
    family = find_family(causal.config.model_type)
    if family is None:  # `eval` measures any model, but only a family's adapter knows what follows the head
        logits = causal(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        return _cross_entropy(logits, tokens[:, 1:].flatten().to(logits.device))
    hidden_states = last_hidden_states(model, tokens)
    head = causal.get_output_embeddings()
    rows = hidden_states[:, :-1].reshape(-1, hidden_states.shape[-1])
    targets = tokens[:, 1:].reshape(-1).to(rows.device)
    total = torch.zeros((), device=rows.device, dtype=torch.float32)
    for part, part_targets in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        total += _cross_entropy(family.finish_logits(causal.config, head(part)), part_targets)
    return total


def last_hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the hidden states `(B, T, hidden)` of a causal model behind its final norm, for `tokens` `(B, T)`."""
    causal: Any = model
    with _one_sequence_per_row():
        hidden_states: Tensor = causal.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden_states


@contextmanager
def residual_streams(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that is filled with the outputs `(B, T, hidden)` of these decoder layers, in one forward pass."""
    streams: list[Tensor] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of logits `(rows, vocabulary)` in any dtype: a float32 scalar."""
    total = torch.zeros((), device=logits.device, dtype=torch.float32)
    # Allocated once: small tensors allocated in between would fragment the heap.
    buffers = logits.new_empty(2, min(SOFTMAX_ROWS, len(logits)), logits.shape[1], dtype=torch.float32)
    for part, part_targets in zip(logits.split(SOFTMAX_ROWS), targets.split(SOFTMAX_ROWS), strict=True):
        in_float32, log_probabilities = buffers[:, : len(part)]
        torch.log_softmax(in_float32.copy_(part), -1, out=log_probabilities)
        total += functional.nll_loss(log_probabilities, part_targets, reduction="sum")
    return total


@contextmanager
def _one_sequence_per_row() -> Iterator[None]:
    """Tell transformers that every row of tokens is one sequence.

    Otherwise it finds that out from the positions in each forward pass, which on a GPU makes the host wait for
    everything it has launched. A transformers without this function needs no patch.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    if original is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, original)


class Evaluator:
    """Computes losses of a model under masks. The model is unchanged after every call.

    If memory runs out, the weights that uploads keep on the devices are freed. If it runs out again, batches go through
    in parts from then on.
    """

    def __init__(self, model: PrunableModel) -> None:
        self.model = model
        self.splitter = BatchSplitter()
        self._orders: ElementOrders = {}
        self._uploads: Uploads | None = None

    @contextmanager
    def in_order(self, orders: ElementOrders) -> Iterator[None]:
        """Put the elements of blocks into an order inside the `with`, so that masks along it need no gathering.

        orders: see `elements_in_order`. Masks still number the elements as the model does, but the repaired weights of
        these blocks must have their rows and columns in this order.
        """
        with elements_in_order(self.model, orders):
            self._orders = orders
            try:
                yield
            finally:
                self._orders = {}

    @contextmanager
    def uploading(self, uploads: Uploads | None) -> Iterator[None]:
        """Let `uploads`, if given, bring repaired weights to their devices inside the `with`, and close it then."""
        self._uploads = uploads
        try:
            yield
        finally:
            self._uploads = None
            if uploads is not None:
                uploads.close()

    @property
    def make_room(self) -> Callable[[], None] | None:
        """Return what frees memory on the devices before a batch is split, None if nothing does."""
        return self._uploads.make_room if self._uploads is not None and self._uploads.keeps_weights else None

    def losses(
        self, model_masks: Sequence[ModelMask], tokens: Tensor, repaired: Sequence[RepairedBlocks] | None = None
    ) -> Tensor:
        """Return the mean next-token loss on `tokens` `(B, T)` int64 under K masks: `(K,)` float64, nats per token.

        repaired: the repaired blocks of each mask. A loss that overflows is returned as it is (inf or NaN).
        Raises RunError if memory does not suffice for one window.
        """
        tokens = tokens.to(self.model.device)
        pairs = zip(model_masks, repaired or [{} for _ in model_masks], strict=True)
        losses = [self._summed(model_mask, tokens, own) for model_mask, own in pairs]
        if not losses:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack(losses).cpu() / (tokens.shape[0] * (tokens.shape[1] - 1))

    def _summed(self, model_mask: ModelMask, tokens: Tensor, repaired: RepairedBlocks) -> Tensor:
        """Return the loss of one mask summed over all predictions: a float64 scalar on the model's device."""
        parts: list[Tensor] = []

        def run(windows: slice) -> None:
            # Shrunk anew for each slice: a block whose gathering ran out of memory is half swapped.
            with self.shrunk(model_mask, repaired) as model:
                parts.append(summed_loss(model, tokens[windows]))

        self.splitter.run_slices(len(tokens), run, self.make_room)
        return torch.stack(parts).double().sum()

    @contextmanager
    def shrunk(self, model_mask: ModelMask, repaired: RepairedBlocks | None = None) -> Iterator[nn.Module]:
        """Shrink the model to a mask inside the `with`; it is dense again on every way out."""
        refitted, coming = repaired or {}, NOTHING_COMES
        with ExitStack() as undo:
            if self._uploads is not None:
                refitted, coming = undo.enter_context(self._uploads.during(refitted))
            for index, name, block in self._blocks:
                key, mask = (index, name), model_mask[index].of(name)
                undo.enter_context(block.shrunk(mask, refitted.get(key), self._orders.get(key), coming.get(key)))
            yield self.model.module

    @cached_property
    def _blocks(self) -> list[tuple[int, str, ShrinkableBlock]]:
        """All blocks with their layers and names."""
        family = self.model.family
        return [
            (index, block.name, ShrinkableBlock.of(family, layer, block))
            for index, layer in enumerate(self.model.layers)
            for block in family.blocks_of(layer)
        ]


def shrink(model: PrunableModel, model_mask: ModelMask, repaired: RepairedBlocks) -> None:
    """Shrink a loaded model to a mask for good, block by block, so that no forward pass gathers anything.

    The weights that are removed are freed. The model must be in its full weight format.
    """
    for index, (layer, layer_mask) in enumerate(zip(model.layers, model_mask, strict=True)):
        for block in model.family.blocks_of(layer):
            own = repaired.get((index, block.name))
            ShrinkableBlock.of(model.family, layer, block).shrink(layer_mask.of(block.name), own)
