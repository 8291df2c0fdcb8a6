"""Fit of the last layers to the dense model's predictions.

Little follows the last layers, so their blocks need not imitate what the dense blocks write: in the end, their weights
can be fitted together to what the dense model predicts. AdamW minimises KL(dense ‖ pruned) of the next-token
distributions, in nats per token, over the weights of the repaired blocks of these layers. Everything before them is
fixed: nothing is back-propagated beyond them, and the memory is that of these few layers and of the logits of a few
hundred positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.console.progress import LayerProgress
from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.block_text import ModuleRunner
from pgprune_cli.forward.masked import last_hidden_states
from pgprune_cli.forward.row_divergence import row_divergences
from pgprune_cli.forward.shards import ShardedRun, Shards, shard_batches
from pgprune_cli.forward.shrunk_block import shrunk_block
from pgprune_cli.forward.states import rows_on
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import LayerMask, RepairedBlock, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.training import (
    TOKENS_PER_STEP,
    Weights,
    add_gradients,
    best_of,
    compute_dtype,
    converted,
    epochs_of,
    fitted,
    parts,
    set_aside_and_trained,
    set_gradients,
    trained,
)
from pgprune_cli.repair.whole_block import block_of, kept_weights

LEARNING_RATE = 5e-4
"""Largest learning rate of AdamW."""

TOKENS = 98_304
"""Tokens that the fit reads, at most. It reads them once."""

ROWS = 256
"""Positions whose logits exist at the same time."""


def last_layers_batches(batches: Sequence[Tensor]) -> list[int]:
    """Return the indices of the batches `(B, T)` that the fit reads: TOKENS tokens at most, spread over the text."""
    count = min(len(batches), max(1, TOKENS // batches[0].numel()))
    return [index * len(batches) // count for index in range(count)]


@dataclass(frozen=True)
class Predictions:
    """What the dense model predicts on this process's batches among those that the fit reads.

    states: its hidden states `(B, T, hidden)` behind the final norm by place in the own text, on the host; shards: of
    the windows in these batches.
    """

    states: Mapping[int, Tensor]
    shards: Shards

    @classmethod
    def of(cls, model: PrunableModel, batches: Sequence[Tensor], run: ShardedRun) -> Predictions:
        """Run the dense model on the batches that the fit reads.

        batches: the whole text of `run`. Undivided processes share the passes.
        """
        chosen, ranks = last_layers_batches(batches), run.shards.ranks
        places = shard_batches(len(batches), model.device)
        windows = tuple(sum(len(batches[index]) for index in chosen if index in part) for part in places)
        own = [index for index in chosen if index in run.batches]
        computed = dense_states(model, [batches[index] for index in own], ALONE if run.shards.is_divided else ranks)
        states = {index - run.batches.start: state for index, state in zip(own, computed, strict=True)}
        return cls(states, replace(run.shards, windows=windows))


@torch.no_grad()
def dense_states(model: PrunableModel, batches: Sequence[Tensor], ranks: Ranks = ALONE) -> list[Tensor]:
    """Return the dense model's hidden states behind the final norm, batch by batch `(B, T, hidden)`, on the host.

    ranks: of the processes that ask for the same batches, and share them.
    """

    def compute(index: int) -> Tensor:
        return last_hidden_states(model.module, batches[index].to(model.device)).cpu()

    hidden = model.head.weight.shape[1]
    return list(ranks.divide(compute, [(*tokens.shape, hidden) for tokens in batches], model.dtype))


def fitted_layers(model: PrunableModel, count: int) -> range:
    """Return which layers a fit of the last `count` of them changes: not those with experts, nor any before them."""
    end = len(model.layers)
    first = max(0, end - count)
    for index in range(first, end):
        layer = model.layers[index]
        if any(model.shape.grids[block.name][index].separate for block in model.family.blocks_of(layer)):
            first = index + 1
    return range(first, end)


def tokens_at_once(layers: int) -> int:
    """Return how many tokens of a step run through some layers at once: the fewer, the more layers, to save memory."""
    return max(ROWS, TOKENS_PER_STEP // layers)


def inputs_of_fit(run: ShardedRun, predicted: Predictions) -> Tensor:
    """Return what the fit reads of the hidden states of a run at its first layer: `(rows, T, hidden)`, on the host."""
    batches = run.hidden_states
    if not predicted.states:  # this process may own no batch that the fit reads
        return batches[0][:0].cpu()
    return torch.cat([batches[place].cpu() for place in predicted.states])


def fit_last_layers(
    run: ShardedRun,
    model: PrunableModel,
    masks: Mapping[int, LayerMask],
    repaired: RepairedBlocks,
    inputs: Tensor,
    predicted: Predictions,
    progress: LayerProgress,
) -> dict[tuple[int, str], RepairedBlock]:
    """Return the repaired blocks of the last layers, refitted to the dense model's predictions if that helps.

    Args:
        run: at the last layer. All layers are dense.
        masks: of the layers that are fitted, in order, by index.
        repaired: theirs at least. A block that keeps all of its units stays as it is.
        inputs: of the first of these layers, see `inputs_of_fit`.
        predicted: what the fit reads of the text of `run`.
        progress: is told the steps of the fit.
    """
    family, first = model.family, run.runs[0]
    start: dict[str, Tensor] = {}
    runners = []
    with ExitStack() as undo:
        for index, mask in masks.items():
            layer, settings = model.layers[index], list[tuple[nn.Module, str, Any]]()
            for block in family.blocks_of(layer):
                own, kept = repaired.get((index, block.name)), mask.of(block.name)
                if own is None:
                    undo.enter_context(shrunk_block(family, layer, block, kept, None))
                    continue
                settings += family.settings(layer, block, *model.shape.grids[block.name][index].kept(kept))
                device = next(layer.get_submodule(block.module).parameters()).device
                weights = kept_weights(family, layer, block, kept, own)
                start |= {_name(index, block, name): weight.to(device) for name, weight in weights.items()}
            runners.append(ModuleRunner(first, index, "", settings))
        states = torch.cat([inputs[:0], *predicted.states.values()])
        for own_run in run.runs:
            del own_run.hidden_states[1:]  # the fit has read what it needs of them
        fit = _Fit(model, runners, inputs, states, predicted.shards, progress)
        solved = fitted(first, lambda: fit.solve(start))
    refitted = {key: block for key, block in repaired.items() if key[0] in masks}
    if solved is start:
        return refitted
    for index in masks:
        for block in family.blocks_of(model.layers[index]):
            if own_weights := _inside(solved, _name(index, block, "")):
                bias = repaired[index, block.name].bias
                own = block_of(family, model.layers[index], block, own_weights, bias)
                refitted[index, block.name] = own if index == first.position else own.on_host()
    return refitted


def _name(index: int, block: Block, name: str) -> str:
    """Return the name of a weight in the fit. name: inside the block's module."""
    return f"{index}.{block.module}.{name}"


def _inside(weights: Weights, prefix: str) -> Weights:
    """Return the weights whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@dataclass(eq=False)
class _Fit:
    """One fit.

    runners: of the layers, in order; inputs of the first of them and final hidden states of the dense model: each
    `(rows, T, hidden)`, windows of the own shards, on the host.
    """

    model: PrunableModel
    runners: Sequence[ModuleRunner]
    inputs: Tensor
    predicted: Tensor
    shards: Shards
    progress: LayerProgress

    def solve(self, start: Weights) -> Weights:
        """Return weights that predict more like the dense model does on the windows set aside, or `start` itself."""
        set_aside, rest = set_aside_and_trained(self.shards.windows, seed=0)
        if not start or not len(set_aside):
            return start
        steps = epochs_of(rest, self.inputs.shape[1], epochs=1, seed=0)
        done = itertools.count(1)
        self.progress.steps_done(0, len(steps))

        def set_own(weights: Weights, windows: Tensor) -> None:
            self._set_gradients(weights, windows)
            self.progress.steps_done(next(done), len(steps))

        candidates = trained(start, steps, LEARNING_RATE, set_own)
        return best_of(start, candidates, lambda weights: self.divergence(weights, set_aside))

    @torch.no_grad()
    def divergence(self, weights: Weights, windows: Tensor) -> float:
        """Return KL(dense ‖ pruned) on some windows `(n,)`, in nats per token."""
        computed = converted(weights, self._compute_dtype)

        def summed(rows: Tensor) -> float:
            total = 0.0
            for part in parts(rows, self.inputs.shape[1]) if len(rows) else ():
                states, wanted = self._states(computed, part), self._wanted(part)
                for own, dense in zip(states.split(ROWS), wanted.split(ROWS), strict=True):
                    total += float(self._summed_divergence(own, dense))
            return total

        return self.shards.total(windows, summed) / (windows.numel() * self.inputs.shape[1])

    def _set_gradients(self, weights: Weights, windows: Tensor) -> None:
        """Set the gradients of the mean divergence on the windows `(n,)` of a step."""
        tokens = windows.numel() * self.inputs.shape[1]

        def add(part: Tensor) -> None:
            with torch.enable_grad():
                states = self._states(converted(weights, self._compute_dtype), part)
                slopes: list[Tensor] = []
                for own, dense in zip(states.split(ROWS), self._wanted(part).split(ROWS), strict=True):
                    leaf = own.detach().requires_grad_()
                    slopes += torch.autograd.grad(self._summed_divergence(leaf, dense), [leaf])
                gradients = torch.autograd.grad(states, list(weights.values()), torch.cat(slopes))
            # Divided last: those of the states can be float16, in which small numbers lose their digits.
            add_gradients(weights, [gradient / tokens for gradient in gradients])

        def add_slices(rows: Tensor) -> None:
            self.runners[0].run.run_slices(len(rows), lambda part: add(rows[part]))

        def add_parts(rows: Tensor) -> None:
            for part in rows.split(max(1, tokens_at_once(len(self.runners)) // self.inputs.shape[1])):
                add_slices(part)

        set_gradients(self.shards, weights, windows, add_parts)

    def _states(self, weights: Weights, rows: Tensor) -> Tensor:
        """Return the hidden states behind the final norm `(n · T, hidden)` of some rows, with a graph."""
        states = rows_on(self.runners[0].device, self.inputs, rows).to(self._compute_dtype)
        for runner in self.runners:
            states = runner.output(_inside(weights, f"{runner.index}."), states.to(runner.device))
        norm, head = self.model.final_norm, self.model.head
        weight = next(norm.parameters())
        normed: Tensor = norm(states.to(weight.device, weight.dtype))
        return normed.flatten(0, 1).to(next(head.parameters()).device)

    def _wanted(self, rows: Tensor) -> Tensor:
        """Return the dense model's hidden states `(n · T, hidden)` of some rows."""
        return rows_on(next(self.model.head.parameters()).device, self.predicted, rows).flatten(0, 1)

    def _summed_divergence(self, states: Tensor, dense: Tensor) -> Tensor:
        """Return the summed divergence of some rows of hidden states: a float32 scalar."""
        with torch.no_grad():
            reference = self._logits(dense)
        return row_divergences(self._logits(states), reference).sum()

    def _logits(self, states: Tensor) -> Tensor:
        return self.model.family.finish_logits(self.model.config, self.model.head(states))

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.inputs.dtype)
