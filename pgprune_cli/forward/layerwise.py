"""Run a model one decoder layer at a time over all calibration text.

This is for work that needs a layer's inputs from every batch before the next layer runs: second moments that fit into
memory for one layer only, or a repair that changes weights.

    run = start_layerwise(model, batches)
    for index in range(layers):
        run.advance(index, {(block.output_path,): observe})  # observe(x) gets every batch's inputs `(B, T, in)`

The hidden states are on the devices of the layers if these have room for them (forward/states.py). Once memory has run
out, they move to the host. If that does not suffice, a batch goes through, and is observed, in parts. Sums over it are
the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pgprune_cli.console.stderr import warn
from pgprune_cli.forward import states
from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.model.out_of_memory import is_out_of_memory
from pgprune_cli.model.prunable import PrunableModel

Result = TypeVar("Result")

Observers = Mapping[tuple[str, ...], Callable[..., None]]
"""By the paths of submodules inside the layer: a function to call with the first input `(B, T, in)` of each, batch
after batch, once the layer has run. If it raises, it must not have recorded anything of that batch."""

NO_OBSERVERS: Observers = {}


class ModuleCall(NamedTuple):
    """One call of a submodule: its first argument `(B, T, in)`, the others, and the first thing it returned."""

    inputs: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


Watchers = Mapping[str, Callable[[ModuleCall], None]]
"""By the path of a submodule inside the layer: a function that is told of each of its calls, once the layer has run. It
must not allocate memory on the layer's device."""

NO_WATCHERS: Watchers = {}


class Movable(Protocol):
    """Tensors that are kept where a run keeps its hidden states."""

    def to_host(self) -> None:
        """Move the tensors to the host."""


class LayerArguments(NamedTuple):
    """What the decoder passes to one layer besides the hidden states: masks, positions, whatever the family needs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerCalls:
    """The arguments that the decoder passes to its layers, for windows `(B, T)` of every shape, on the model's devices.

    Without padding they depend on nothing but the shape. The decoder itself is asked: it runs once with layers that
    only record their arguments, so that layers with masks of their own (sliding windows) get them.
    """

    def __init__(self, model: PrunableModel) -> None:
        self.model = model
        self.by_shape: dict[torch.Size, list[LayerArguments]] = {}

    def for_shape(self, shape: torch.Size) -> list[LayerArguments]:
        """Return the arguments layer by layer for windows of a shape."""
        if shape not in self.by_shape:
            self.first_inputs(torch.zeros(shape, dtype=torch.int64))
        return self.by_shape[shape]

    def first_inputs(self, tokens: Tensor) -> Tensor:
        """Return the inputs `(B, T, hidden)` of the first layer, on its device."""
        with torch.no_grad(), _recorded_calls(self.model.layers) as calls:
            self.model.decoder(input_ids=tokens.to(self.model.device), use_cache=False)
        self.by_shape.setdefault(tokens.shape, [arguments for _, arguments in calls])
        return calls[0][0]


@dataclass
class LayerwiseRun:
    """The hidden states of all batches on their way through the layers.

    layers: of the model; each runs as it is when its turn comes, so its weights and blocks may change before that;
    hidden_states: per batch the input `(B, T, hidden)` of layer `position`, after the last layer its output before the
    final norm, in the model's dtype; on_host: whether they are there, and not on the devices of the layers; followers:
    what moves to the host with them.
    """

    layers: nn.ModuleList
    hidden_states: list[Tensor]
    calls: LayerCalls
    splitter: BatchSplitter
    on_host: bool
    position: int = 0
    followers: WeakSet[Movable] = field(default_factory=WeakSet)

    def to_host(self) -> None:
        """Move the hidden states, and what follows them, to the host."""
        if self.on_host:
            return
        device, self.on_host = self.hidden_states[0].device, True
        self.hidden_states[:] = [batch.cpu() for batch in self.hidden_states]
        for follower in self.followers:
            follower.to_host()
        warn(f"{device}: out of memory. Hidden states move to the host, which takes longer.")

    def observe(self, index: int, observers: Observers, watchers: Watchers = NO_WATCHERS) -> None:
        """Run layer `index` on all batches and discard its outputs: only what observers and watchers see counts.

        Raises ValueError if the hidden states are not the inputs of that layer.
        """
        for _ in self._outputs(index, observers, watchers):
            pass

    def run_slices(self, windows: int, run: Callable[[slice], None]) -> None:
        """Call `run` for slices of `windows` windows, one if memory suffices. The hidden states move first."""
        self.splitter.run_slices(windows, run, None if self.on_host else self.to_host)

    def with_room(self, compute: Callable[[], Result]) -> Result:
        """Return what `compute` returns. If memory runs out, the hidden states move, and it is called again."""
        try:
            return compute()
        except RuntimeError as error:
            if self.on_host or not is_out_of_memory(error):
                raise
        # Only after the except clause: until then the traceback keeps the tensors of the failed attempt alive.
        self.to_host()
        torch.cuda.empty_cache()
        return compute()

    def call(self, index: int, path: str, windows: int) -> ModuleCall:
        """Return how layer `index` calls a submodule for `windows` windows, each of them the run's first.

        Unlike in the other passes, running out of memory is an error: torch.OutOfMemoryError.
        """
        layer = self._layer(index)
        with _recorded_modules(layer, (), (path,)) as (_, calls):
            self._run(layer, index, self.hidden_states[0][:1].expand(windows, -1, -1))
        return calls[path]

    def advance(self, index: int, observers: Observers = NO_OBSERVERS) -> None:
        """Run layer `index` on all batches and replace the hidden states by its outputs.

        Raises ValueError as `observe` does. After an error inside the layer the run cannot be used any more.
        """
        for place, output in enumerate(self._outputs(index, observers, NO_WATCHERS)):
            self.hidden_states[place] = output.cpu() if self.on_host else output
        self.position += 1

    def _outputs(self, index: int, observers: Observers, watchers: Watchers) -> Iterator[Tensor]:
        layer = self._layer(index)
        paths = {path for paths in observers for path in paths}
        with _recorded_modules(layer, paths, watchers) as (inputs, calls):
            for batch in self.hidden_states:
                parts: list[Tensor] = []

                def run(windows: slice, batch: Tensor = batch, parts: list[Tensor] = parts) -> None:
                    try:
                        output = self._run(layer, index, batch[windows])
                    except BaseException:  # for want of memory: a smaller part needs the room of what is recorded
                        inputs.clear()
                        calls.clear()
                        raise
                    for paths, observe in observers.items():
                        self._show(observe, [inputs[path] for path in paths])
                    inputs.clear()
                    for path, watch in watchers.items():
                        watch(calls.pop(path))
                    parts.append(output)

                self.run_slices(len(batch), run)
                yield torch.cat(parts) if len(parts) > 1 else parts[0]

    def _layer(self, index: int) -> nn.Module:
        if index != self.position:
            raise ValueError(f"the hidden states are inputs of layer {self.position}, not of layer {index}")
        return self.layers[index]

    def _run(self, layer: nn.Module, index: int, hidden_states: Tensor) -> Tensor:
        """Return the output of a layer. no_grad, not inference_mode: a repair may compute with it outside of it."""
        call = self.calls.for_shape(hidden_states.shape[:2])[index]
        with torch.no_grad():
            output = layer(hidden_states.to(next(layer.parameters()).device), *call.args, **call.kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def _show(self, observe: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        """Call an observer, in parts if it needs more memory than the forward pass, which is not repeated for it."""
        self.run_slices(len(inputs[0]), lambda windows: observe(*(tensor[windows] for tensor in inputs)))


@contextmanager
def _recorded_modules(
    layer: nn.Module, observed: Iterable[str], watched: Iterable[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, ModuleCall]]]:
    """Inside the `with`, yield the newest first inputs of the observed submodules and calls of the watched, by path."""
    inputs: dict[str, Tensor] = {}
    calls: dict[str, ModuleCall] = {}
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda _, arguments, path=path: inputs.update({path: arguments[0]})
        )
        for path in observed
    ]
    handles += [
        layer.get_submodule(path).register_forward_hook(
            lambda _, args, kwargs, output, path=path: calls.update({path: _call(args, kwargs, output)}),
            with_kwargs=True,
        )
        for path in watched
    ]
    try:
        yield inputs, calls
    finally:
        for handle in handles:
            handle.remove()


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> ModuleCall:
    """Return a call of a submodule. Its first argument may have been passed by name."""
    first, *others = args or (kwargs["hidden_states"],)
    rest = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
    return ModuleCall(first, tuple(others), rest, output[0] if isinstance(output, tuple) else output)


def start_layerwise(
    model: PrunableModel,
    batches: Iterable[Tensor],
    *,
    copies: int = 1,
    storage: Literal["host", "devices"] | None = None,
) -> LayerwiseRun:
    """Start a layer-wise run at the first layer, from batches of tokens `(B, T)`. Raises ValueError without batches.

    copies: how many tensors of the size of the hidden states exist at the same time; storage: where the run keeps them,
    by default on the devices of the layers if these have room for them. They take tokens × hidden × bytes of the dtype:
    1.1 GB for 131,072 tokens of a 7B model in bfloat16.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("there is no calibration text to run")
    calls = LayerCalls(model)
    on_host = storage != "devices" if storage else not _have_room(model, batches, copies)
    hidden_states = None if on_host else _states_on_devices(calls, batches)
    if hidden_states is None:
        on_host, hidden_states = True, [calls.first_inputs(tokens).cpu() for tokens in batches]
    return LayerwiseRun(model.layers, hidden_states, calls, BatchSplitter(), on_host)


def _states_on_devices(calls: LayerCalls, batches: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the inputs of the first layer, batch by batch `(B, T, hidden)`, or None if memory runs out."""
    try:
        return [calls.first_inputs(tokens) for tokens in batches]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    return None


def _have_room(model: PrunableModel, batches: Sequence[Tensor], copies: int) -> bool:
    tokens, largest = sum(map(Tensor.numel, batches)), max(map(Tensor.numel, batches))
    needed = states.states_bytes(model, tokens, copies)
    return states.have_room(needed, states.bytes_beside(model, largest), states.free_for_states(model))


@contextmanager
def _recorded_calls(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, LayerArguments]]]:
    """Inside the `with`, every layer records its inputs and passes the hidden states on unchanged."""
    calls: list[tuple[Tensor, LayerArguments]] = []

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden_states, LayerArguments(args, kwargs)))
        return hidden_states

    # accelerate, which spreads layers over devices, gives each of them a forward of its own.
    originals = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield calls
    finally:
        for layer, original in zip(layers, originals, strict=True):
            if original is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = original
