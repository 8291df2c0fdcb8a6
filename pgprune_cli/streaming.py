"""A model run one decoder layer at a time over all calibration text, for what needs a layer's inputs from every batch
before the next layer runs: a covariance that fits into memory for one layer only, or a repair that changes weights.

    stream = layer_inputs(model, batches)
    for index in range(layers):
        stream.advance(index, {"mlp.down_proj": add})  # add(x) sees every batch's inputs `(B, T, in)`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.arch import Shape

Watch = Mapping[str, Callable[[Tensor], None]]
"""By the name of a submodule inside the layer: what to call with its first input, `(B, T, in)`, batch after batch."""


class Call(NamedTuple):
    """What the decoder hands to one layer besides the hidden states: masks, positions, whatever the family needs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Stream:
    """The hidden states of all batches on their way through the layers.

    layers: of the model, run as they are when their turn comes, so their weights and blocks may be changed meanwhile;
    hidden: per batch the input `(B, T, hidden)` of layer `position`, or after the last layer its output, before the
    final norm, in the model's dtype, on the storage device; calls: per batch and layer, kept on the model's devices.
    """

    layers: nn.ModuleList
    hidden: list[Tensor]
    calls: list[list[Call]]
    position: int = 0

    def copy(self) -> Stream:
        """A second stream from here on, for a dense and a pruned model side by side; nothing is run or doubled."""
        return replace(self, hidden=list(self.hidden))

    def observe(self, index: int, watch: Watch) -> None:
        """Runs layer `index` on all batches and forgets its outputs: only what `watch` sees counts.

        Raises ValueError when the hidden states are not that layer's inputs.
        """
        for _ in self._outputs(index, watch):
            pass

    def advance(self, index: int, watch: Watch | None = None) -> None:
        """Runs layer `index` on all batches and replaces the hidden states by its outputs.

        Raises ValueError as `observe` does. After an error of the layer itself the stream is of no further use.
        """
        for place, output in enumerate(self._outputs(index, watch or {})):
            self.hidden[place] = output.to(self.hidden[place].device)
        self.position += 1

    def _outputs(self, index: int, watch: Watch) -> Iterator[Tensor]:
        if index != self.position:
            raise ValueError(f"the hidden states are inputs of layer {self.position}, not of layer {index}")
        layer = self.layers[index]
        device = next(layer.parameters()).device
        handles = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _, inputs, see=see: see(inputs[0]))
            for name, see in watch.items()
        ]
        try:
            for hidden, calls in zip(self.hidden, self.calls, strict=True):
                # no_grad, not inference_mode: a repair may compute with these outside of it.
                with torch.no_grad():
                    output = layer(hidden.to(device), *calls[index].args, **calls[index].kwargs)
                yield output[0] if isinstance(output, tuple) else output
        finally:
            for handle in handles:
                handle.remove()


def layer_inputs(model: nn.Module, batches: Iterable[Tensor], storage: str | torch.device = "cpu") -> Stream:
    """A stream at the first layer, from batches of tokens `(B, T)`, with the hidden states kept on `storage`.

    The decoder itself is asked what it hands to each layer: its forward runs with layers that only take notes, so that
    layers with masks of their own (sliding windows) get theirs. Batches of one shape share these notes, as without
    padding they depend on nothing else. Memory on `storage`: tokens × hidden × bytes of the dtype, 1.1 GB for 131,072
    tokens of a 7B model in bfloat16.

    Raises ValueError when there are no batches.
    """
    layers = model.get_submodule(Shape.of(model).spec.layers)
    assert isinstance(layers, nn.ModuleList)
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    device = decoder.get_input_embeddings().weight.device
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    by_shape: dict[torch.Size, list[Call]] = {}
    for tokens in batches:
        with torch.no_grad(), _taking_notes(layers) as notes:
            decoder(input_ids=tokens.to(device), use_cache=False)
        hidden.append(notes[0][0].to(storage))
        calls.append(by_shape.setdefault(tokens.shape, [call for _, call in notes]))
    if not hidden:
        raise ValueError("there is no calibration text to run")
    return Stream(layers, hidden, calls)


@contextmanager
def _taking_notes(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, Call]]]:
    """While inside, every layer writes down its inputs and passes the hidden states on as they are."""
    notes: list[tuple[Tensor, Call]] = []

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        notes.append((hidden_states, Call(args, kwargs)))
        return hidden_states

    # accelerate, which spreads layers over devices, keeps a forward of its own on each of them.
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield notes
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own
