"""What one dense block reads and writes on the calibration text, and how to run the block on other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pgprune_cli.forward.layerwise import LayerArguments, LayerwiseRun, ModuleCall, Observers, Watchers
from pgprune_cli.forward.moments import token_weights
from pgprune_cli.forward.short_attention import ShortAttention
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.out_of_memory import is_out_of_memory

Settings = Sequence[tuple[nn.Module, str, Any]]
"""Attributes of modules, and the values that they have while something runs."""


class BlockText:
    """The inputs and outputs of a dense block, and the weights of its tokens, window by window.

    Register `observers` and `watchers` with layer-wise runs, one after another. Afterwards it holds inputs and outputs
    `(windows, T, hidden)` in the dtype of the model, and weights `(windows, T)` float32, those of the moments, where
    the runs keep their hidden states.
    """

    inputs: Tensor
    outputs: Tensor
    weights: Tensor

    def __init__(self, runs: Sequence[LayerwiseRun], family: ModelFamily, block: Block) -> None:
        self._watched = self._weighed = 0
        try:
            self._allocate(runs)
        except RuntimeError as error:
            if all(run.on_host for run in runs) or not is_out_of_memory(error):
                raise
            for run in runs:
                run.to_host()
            self._allocate(runs)
        for run in runs:
            run.followers.add(self)
        self._weighed_paths = (family.residual, *([block.post_norm] if block.post_norm else []))
        self._watched_path = block.module

    @property
    def observers(self) -> Observers:
        """What a layer-wise run has to call. It is not kept here, where it would keep the text alive."""
        return {self._weighed_paths: self._weigh}

    @property
    def watchers(self) -> Watchers:
        """What a layer-wise run has to tell of calls."""
        return {self._watched_path: self._watch}

    def to_host(self) -> None:
        """Move the text to the host."""
        self.inputs, self.outputs, self.weights = self.inputs.cpu(), self.outputs.cpu(), self.weights.cpu()

    def _allocate(self, runs: Sequence[LayerwiseRun]) -> None:
        first = runs[0].hidden_states[0]
        windows = sum(len(batch) for run in runs for batch in run.hidden_states)
        self.inputs = first.new_empty(windows, *first.shape[1:])
        self.outputs = torch.empty_like(self.inputs)
        self.weights = torch.empty(windows, first.shape[1], device=first.device)

    def _watch(self, call: ModuleCall) -> None:
        rows = slice(self._watched, self._watched + len(call.inputs))
        self.inputs[rows].copy_(call.inputs)
        self.outputs[rows].copy_(call.output)
        self._watched = rows.stop

    def _weigh(self, residual: Tensor, block_output: Tensor | None = None) -> None:
        rows = slice(self._weighed, self._weighed + len(residual))
        self.weights[rows].copy_(token_weights(residual, block_output).view(residual.shape[:2]))
        self._weighed = rows.stop


class ModuleRunner:
    """Runs a submodule of layer `index` on given weights, without the rest of the layer. The module must be dense.

    path: of the module inside the layer, "" for the layer itself; settings: the attributes (owner, name, value) that it
    has while it runs, because they depend on the size of the weights. A layer can run at any time, a part of one only
    while `run` is at that layer.
    """

    def __init__(self, run: LayerwiseRun, index: int, path: str, settings: Settings) -> None:
        self.run, self.index, self.path, self.settings = run, index, path, settings
        self.module = run.layers[index].get_submodule(path)
        self.device = next(self.module.parameters()).device
        self.dtype = run.hidden_states[0].dtype
        self._arguments_by_windows: dict[int, LayerArguments] = {}

    def output(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return the output `(B, T, hidden)` of the module for `inputs` of the same shape, with a graph.

        It is computed in the dtype of the inputs. weights: in that dtype, by their names inside the module, on its
        device. The other tensors of the module are the model's own.
        """
        own = dict(self.module.named_parameters())
        parameters = {
            name: _converted(value, self.dtype, inputs.dtype)
            for name, value in own.items()
            if name not in weights and inputs.dtype != self.dtype
        }
        args, kwargs = tree_map(
            lambda value: _converted(value, self.dtype, inputs.dtype), tuple(self._arguments(inputs.shape[:2]))
        )
        with ExitStack() as undo:
            if self.device.type == "cpu":
                undo.enter_context(ShortAttention())
            for owner, attribute, value in self.settings:
                undo.callback(setattr, owner, attribute, getattr(owner, attribute))
                setattr(owner, attribute, value)
            for name, weight in weights.items():
                if name in own:
                    parameters[name] = weight
                else:  # a rounded weight
                    linear = self.module.get_submodule(name.rpartition(".")[0])
                    undo.callback(setattr, linear, "kept", None)
                    linear.kept = weight
            output = functional_call(self.module, parameters, (inputs, *args), kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def _arguments(self, shape: torch.Size) -> LayerArguments:
        """Return what the module is called with besides windows `(B, T)`. Raises torch.OutOfMemoryError."""
        if not self.path:
            return self.run.calls.for_shape(shape)[self.index]
        windows = shape[0]
        if windows not in self._arguments_by_windows:
            call = self.run.call(self.index, self.path, windows)
            self._arguments_by_windows[windows] = LayerArguments(call.args, call.kwargs)
        return self._arguments_by_windows[windows]


class BlockRunner(ModuleRunner):
    """Runs a dense block of layer `index`. size: the number of groups, and of members in each, of the weights."""

    def __init__(self, run: LayerwiseRun, index: int, family: ModelFamily, block: Block, size: tuple[int, int]) -> None:
        super().__init__(run, index, block.module, family.settings(run.layers[index], block, *size))


def _converted(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Return a tensor of one dtype in another, and anything else as it is."""
    return value.to(target) if isinstance(value, Tensor) and value.dtype == source else value
