"""A model run one decoder layer at a time over all calibration text, for what needs a layer's inputs from every batch
before the next layer runs: a covariance that fits into memory for one layer only, or a repair that changes weights.

    stream = layer_inputs(model, batches)
    for index in range(layers):
        stream.advance(index, {("mlp.down_proj",): add})  # add(x) sees every batch's inputs `(B, T, in)`

Where memory runs out, a batch goes through in parts (portions.py), and is seen in parts: sums over it are the same up
to the rounding of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.model.prunable import Shape

Watch = Mapping[tuple[str, ...], Callable[..., None]]
"""By the names of submodules inside the layer: what to call with the first input of each, `(B, T, in)`, batch after
batch, when the layer has run. It takes a batch or, where it raises, nothing of it."""


class Call(NamedTuple):
    """What the decoder hands to one layer besides the hidden states: masks, positions, whatever the family needs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Calls:
    """What the decoder hands to its layers, for windows `(B, T)` of every shape: without padding, it depends on nothing
    else. Kept on the model's devices.

    The decoder itself is asked: its forward runs with layers that only take notes, so that layers with masks of their
    own (sliding windows) get theirs.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        self.decoder: Any = model.get_decoder()  # type: ignore[operator]
        self.layers = layers
        self.known: dict[torch.Size, list[Call]] = {}

    def of(self, shape: torch.Size) -> list[Call]:
        """Layer by layer."""
        if shape not in self.known:
            self.first_inputs(torch.zeros(shape, dtype=torch.int64))
        return self.known[shape]

    def first_inputs(self, tokens: Tensor) -> Tensor:
        """Of the first layer, `(B, T, hidden)`, where it runs."""
        device = self.decoder.get_input_embeddings().weight.device
        with torch.no_grad(), _taking_notes(self.layers) as notes:
            self.decoder(input_ids=tokens.to(device), use_cache=False)
        self.known.setdefault(tokens.shape, [call for _, call in notes])
        return notes[0][0]


@dataclass
class Stream:
    """The hidden states of all batches on their way through the layers.

    layers: of the model, run as they are when their turn comes, so their weights and blocks may be changed meanwhile;
    hidden: per batch the input `(B, T, hidden)` of layer `position`, or after the last layer its output, before the
    final norm, in the model's dtype, on the storage device.
    """

    layers: nn.ModuleList
    hidden: list[Tensor]
    calls: Calls
    portions: BatchSplitter
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
        seen: dict[str, Tensor] = {}
        handles = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: inputs[0]})
            )
            for name in {name for names in watch for name in names}
        ]
        try:
            for hidden in self.hidden:
                parts: list[Tensor] = []

                def run(some: slice, hidden: Tensor = hidden, parts: list[Tensor] = parts) -> None:
                    call = self.calls.of(hidden[some].shape[:2])[index]
                    # no_grad, not inference_mode: a repair may compute with these outside of it.
                    with torch.no_grad():
                        output = layer(hidden[some].to(device), *call.args, **call.kwargs)
                    for names, see in watch.items():
                        self._show(see, [seen[name] for name in names])
                    seen.clear()
                    parts.append(output[0] if isinstance(output, tuple) else output)

                self.portions.each(len(hidden), run)
                yield torch.cat(parts) if len(parts) > 1 else parts[0]
        finally:
            for handle in handles:
                handle.remove()

    def _show(self, see: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        """In parts of their own: what `see` needs may be more than the forward, which is not run again for it."""
        self.portions.each(len(inputs[0]), lambda some: see(*(each[some] for each in inputs)))


def layer_inputs(model: nn.Module, batches: Iterable[Tensor], storage: str | torch.device = "cpu") -> Stream:
    """A stream at the first layer, from batches of tokens `(B, T)`, with the hidden states kept on `storage`.

    Memory on `storage`: tokens × hidden × bytes of the dtype, 1.1 GB for 131,072 tokens of a 7B model in bfloat16.

    Raises ValueError when there are no batches.
    """
    layers = model.get_submodule(Shape.of(model).spec.layers)
    assert isinstance(layers, nn.ModuleList)
    calls = Calls(model, layers)
    hidden = [calls.first_inputs(tokens).to(storage) for tokens in batches]
    if not hidden:
        raise ValueError("there is no calibration text to run")
    return Stream(layers, hidden, calls, BatchSplitter())


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
