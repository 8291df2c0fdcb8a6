"""Where a mask is applied: the loss of the model that a mask leaves.

A mask is evaluated on the **shrunk** model. Just before a block runs, the kept rows and columns of its projections are
gathered into smaller matrices; right after it, the dense matrices are back. So the cost falls with the sparsity, memory
grows by the slices of one block only, and the result equals that of the dense model with the outputs of the removed
units set to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.model.families import find_family
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.masks import ModelMask, RepairedBlock, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import Int8Linear, QuantizedLinear, Rows
from pgprune_cli.model.unit_tensors import KeptElements, UnitTensor, gather

LOGIT_ROWS = 512
"""Positions whose logits exist at the same time: 131 MB in bfloat16 for a vocabulary of 128k."""

SOFTMAX_ROWS = 64
"""How many of them exist in float32, with their log-softmax: few enough for the caches of a CPU."""


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

    Once memory has run out, batches go through in parts.
    """

    def __init__(self, model: PrunableModel) -> None:
        self.model = model
        self.splitter = BatchSplitter()

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

        self.splitter.run_slices(len(tokens), run)
        return torch.stack(parts).double().sum()

    @contextmanager
    def shrunk(self, model_mask: ModelMask, repaired: RepairedBlocks | None = None) -> Iterator[nn.Module]:
        """Shrink the model to a mask inside the `with`; it is dense again on every way out."""
        family = self.model.family
        with ExitStack() as undo:
            for index, (layer, layer_mask) in enumerate(zip(self.model.layers, model_mask, strict=True)):
                for block in family.blocks_of(layer):
                    own = (repaired or {}).get((index, block.name))
                    undo.enter_context(shrunk_block(family, layer, block, layer_mask.of(block.name), own))
            yield self.model.module


def shrink(model: PrunableModel, model_mask: ModelMask, repaired: RepairedBlocks) -> None:
    """Shrink a loaded model to a mask for good, block by block, so that no forward pass gathers anything.

    The weights that are removed are freed. The model must be in its full weight format.
    """
    for index, (layer, layer_mask) in enumerate(zip(model.layers, model_mask, strict=True)):
        for block in model.family.blocks_of(layer):
            mask, own = layer_mask.of(block.name), repaired.get((index, block.name))
            if not mask.any():
                setattr(layer, block.module, model.family.placeholder(block))
            elif own is not None or not mask.all():
                _Slices(model.family, layer, block, mask, own).put()


def shrunk_block(
    family: ModelFamily, layer: nn.Module, block: Block, mask: Tensor, repaired: RepairedBlock | None
) -> AbstractContextManager[None]:
    """Run one block of a layer on its kept elements inside the `with`.

    mask: `(elements,)` bool, regular; repaired: its repaired weights, if there are any.
    A block that keeps nothing is replaced by a placeholder.
    """
    if mask.any():
        module = layer.get_submodule(block.module)
        is_dense = mask.all() and repaired is None
        # int8 weights are unpacked when they are gathered, outside of what a latency measurement times.
        if is_dense and not any(isinstance(part, Int8Linear) for part in module.modules()):
            return nullcontext()
        return _gathered(family, layer, block, mask, repaired)
    return _replaced(layer, block.module, family.placeholder(block))


@contextmanager
def _replaced(layer: nn.Module, name: str, placeholder: nn.Module) -> Iterator[None]:
    dense = layer.get_submodule(name)
    setattr(layer, name, placeholder)
    try:
        yield
    finally:
        setattr(layer, name, dense)


@contextmanager
def _gathered(
    family: ModelFamily, layer: nn.Module, block: Block, mask: Tensor, repaired: RepairedBlock | None
) -> Iterator[None]:
    """Inside the `with`, every forward pass of the block runs on the rows of its kept elements."""
    module = layer.get_submodule(block.module)
    slices = _Slices(family, layer, block, mask, repaired)
    # always_call: the dense weights come back even when the forward pass raises.
    handles = [
        module.register_forward_pre_hook(lambda *_: slices.put()),
        module.register_forward_hook(lambda *_: slices.restore(), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        slices.restore()


class _Slices:
    """Puts the rows of a block's kept elements in place of its dense weights, and takes them out again."""

    def __init__(
        self, family: ModelFamily, layer: nn.Module, block: Block, mask: Tensor, repaired: RepairedBlock | None
    ) -> None:
        self.module = layer.get_submodule(block.module)
        self.tensors = family.unit_tensors(layer, block)
        self.settings = family.settings(layer, block, *family.grid(layer, block).kept(mask))
        self.kept = KeptElements(mask)
        self.refitted = _refitted(block, self.tensors[-1].name, repaired)
        self.device = next(self.module.parameters()).device
        self.undo: list[Callable[[], None]] = []

    def put(self) -> None:
        """Gather the rows of the kept elements, and put them in place of the dense weights."""
        for owner, attribute, value in self.settings:
            self.undo.append(partial(setattr, owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
        for tensor in self.tensors:
            if tensor.name not in self.refitted:
                self._put(tensor.name, _kept_values(self.module, tensor, self.kept))
        for name, value in self.refitted.items():
            self._put(name, value.to(self.device, _dtype(self.module, name), non_blocking=True))

    def restore(self) -> None:
        """Put the dense weights back."""
        while self.undo:
            self.undo.pop()()

    def _put(self, name: str, value: Tensor | Rows) -> None:
        path, _, key = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if key == "weight" and isinstance(owner, QuantizedLinear):
            self.undo.append(partial(setattr, owner, "kept", None))
            owner.kept = value
            return
        assert isinstance(value, Tensor)
        parameter = getattr(owner, key)
        if parameter is None:  # the repair adds a bias that the dense model does not have
            self.undo.append(partial(setattr, owner, key, None))
            setattr(owner, key, nn.Parameter(value, requires_grad=False))
        else:
            self.undo.append(partial(setattr, parameter, "data", parameter.data))
            parameter.data = value


def _refitted(block: Block, output_weight: str, repaired: RepairedBlock | None) -> dict[str, Tensor]:
    """Return the refitted tensors of a block by their names inside its module. output_weight: that of its output's."""
    if repaired is None:
        return {}
    bias = {} if repaired.bias is None else {block.output_bias: repaired.bias}
    return {**repaired.inner, output_weight: repaired.weight, **bias}


def _dtype(module: nn.Module, name: str) -> torch.dtype:
    """Return the dtype that a block computes in with a weight or bias, which it may lack."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, QuantizedLinear):
        return owner.dtype
    parameter: Tensor | None = getattr(owner, key)
    return owner.get_parameter("weight").dtype if parameter is None else parameter.dtype


def _kept_values(module: nn.Module, tensor: UnitTensor, kept: KeptElements) -> Tensor | Rows:
    owner = module.get_submodule(tensor.module)
    if tensor.key == "weight" and isinstance(owner, QuantizedLinear):
        return owner.gathered(tensor, kept)
    return gather(owner.get_parameter(tensor.key).data, tensor, kept)
