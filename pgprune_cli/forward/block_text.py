"""What one dense block reads and writes on the calibration text, and how to run the block on other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pgprune_cli.forward.layerwise import LayerwiseRun, ModuleCall, Observers, Watchers
from pgprune_cli.forward.moments import token_weights
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.quantized import QuantizedLinear


class BlockText:
    """The inputs and outputs of a dense block, and the weights of its tokens, window by window.

    Register `observers` and `watchers` with a layer-wise run. Afterwards it holds inputs and outputs `(windows, T,
    hidden)` in the dtype of the model, and weights `(windows, T)` float32, those of the moments, where the run keeps
    its hidden states.
    """

    def __init__(self, run: LayerwiseRun, family: ModelFamily, block: Block) -> None:
        first = run.hidden_states[0]
        windows = sum(len(batch) for batch in run.hidden_states)
        self.inputs = first.new_empty(windows, *first.shape[1:])
        self.outputs = torch.empty_like(self.inputs)
        self.weights = torch.empty(windows, first.shape[1], device=first.device)
        self._watched = self._weighed = 0
        paths = (family.residual, *([block.post_norm] if block.post_norm else []))
        self.observers: Observers = {paths: self._weigh}
        self.watchers: Watchers = {block.module: self._watch}

    def _watch(self, call: ModuleCall) -> None:
        rows = slice(self._watched, self._watched + len(call.inputs))
        self.inputs[rows].copy_(call.inputs)
        self.outputs[rows].copy_(call.output)
        self._watched = rows.stop

    def _weigh(self, residual: Tensor, block_output: Tensor | None = None) -> None:
        rows = slice(self._weighed, self._weighed + len(residual))
        self.weights[rows].copy_(token_weights(residual, block_output).view(residual.shape[:2]))
        self._weighed = rows.stop


class BlockRunner:
    """Runs one block of layer `index` on given weights, without its layer.

    Inside `with runner.sized(groups, members)`, the block has that number of groups and of members in each.
    """

    def __init__(self, run: LayerwiseRun, index: int, family: ModelFamily, block: Block) -> None:
        self.run, self.index, self.family, self.block = run, index, family, block
        self.layer = run.layers[index]
        self.module = self.layer.get_submodule(block.module)
        self._calls: dict[int, ModuleCall] = {}

    @contextmanager
    def sized(self, groups: int, members: int) -> Iterator[None]:
        """Set the attributes of the block that depend on its size."""
        with ExitStack() as undo:
            for owner, attribute, value in self.family.settings(self.layer, self.block, groups, members):
                undo.callback(setattr, owner, attribute, getattr(owner, attribute))
                setattr(owner, attribute, value)
            yield

    def observe(self, windows: int) -> None:
        """Find out how the layer calls the block for so many windows. The block must be dense."""
        if windows not in self._calls:
            self._calls[windows] = self.run.call(self.index, self.block.module, windows)

    def output(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the output `(B, T, hidden)` of the block for `inputs` of the same shape, with a graph.

        weights: by their names inside the block's module, on its device. `observe` must have seen as many windows.
        """
        call = self._calls[len(inputs)]
        parameters = {}
        with ExitStack() as undo:
            for name, weight in weights.items():
                path, _, key = name.rpartition(".")
                owner: nn.Module = self.module.get_submodule(path)
                if key == "weight" and isinstance(owner, QuantizedLinear):
                    undo.callback(setattr, owner, "kept", None)
                    owner.kept = weight
                else:
                    parameters[name] = weight
            output = functional_call(self.module, parameters, (inputs, *call.args), call.kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first
