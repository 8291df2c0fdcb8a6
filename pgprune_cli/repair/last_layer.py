"""Fit of the last layer to the dense model's predictions.

Behind the last layer there are only the final norm and the unembedding, so its blocks need not imitate what the dense
blocks write: their weights can be fitted to what the dense model predicts. AdamW minimises KL(dense ‖ pruned) of the
next-token distributions, in nats per token, over the weights of the repaired blocks of the last layer. Everything
before it is fixed: nothing is back-propagated beyond this layer, and the memory is that of one layer and of the logits
of a few hundred positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.block_text import ModuleRunner
from pgprune_cli.forward.masked import last_hidden_states
from pgprune_cli.forward.row_divergence import row_divergences
from pgprune_cli.forward.shards import ShardedRun, Shards, shard_batches
from pgprune_cli.forward.shrunk_block import shrunk_block
from pgprune_cli.forward.states import rows_on
from pgprune_cli.model.masks import LayerMask, RepairedBlock
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.training import (
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

TOKENS = 65_536
"""Tokens that the fit reads, at most. It reads them once."""

ROWS = 256
"""Positions whose logits exist at the same time."""


def last_layer_batches(batches: Sequence[Tensor]) -> list[int]:
    """Return the indices of the batches `(B, T)` that the fit reads: TOKENS tokens at most, spread over the text."""
    count = min(len(batches), max(1, TOKENS // batches[0].numel()))
    return [index * len(batches) // count for index in range(count)]


@dataclass(frozen=True)
class Predictions:
    """What the dense model predicts on the batches that the fit reads: of those that this process has.

    states: its hidden states `(B, T, hidden)` behind the final norm by place in the own text, on the host; shards: of
    the windows in these batches.
    """

    states: Mapping[int, Tensor]
    shards: Shards

    @classmethod
    def of(cls, model: PrunableModel, batches: Sequence[Tensor], run: ShardedRun) -> Predictions:
        """Run the dense model on some `batches` of the text of `run`, all of it. Processes share what all need."""
        chosen, ranks = last_layer_batches(batches), run.shards.ranks
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


def fit_last_layer(
    run: ShardedRun,
    model: PrunableModel,
    mask: LayerMask,
    repaired: Mapping[str, RepairedBlock],
    predicted: Predictions,
) -> dict[str, RepairedBlock]:
    """Return the repaired blocks of the last layer, refitted to the dense model's predictions if that helps.

    Args:
        run: at the last layer. The layer is dense.
        mask, repaired: of the last layer, the blocks by name. A block that keeps all of its units stays as it is, and
            so does a whole layer with experts.
        predicted: what the fit reads of the text of `run`.
    """
    index = len(model.layers) - 1
    layer, family = model.layers[index], model.family
    grids = {block.name: model.shape.grids[block.name][index] for block in family.blocks_of(layer)}
    if any(grid.separate for grid in grids.values()):
        return dict(repaired)
    settings: list[tuple[nn.Module, str, Any]] = []
    start: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for block in family.blocks_of(layer):
            own, kept = repaired.get(block.name), mask.of(block.name)
            if own is None:
                undo.enter_context(shrunk_block(family, layer, block, kept, None))
                continue
            settings += family.settings(layer, block, *grids[block.name].kept(kept))
            weights = kept_weights(family, layer, block, kept, own)
            start |= {f"{block.module}.{name}": weight for name, weight in weights.items()}
        first = run.runs[0]
        runner = ModuleRunner(first, index, "", settings)
        inputs = first.with_room(lambda: _joined(run.hidden_states, predicted.states))
        states = torch.cat([inputs[:0].cpu(), *predicted.states.values()])
        for own_run in run.runs:
            del own_run.hidden_states[1:]  # only the fit reads them from now on
        fit = _Fit(model, runner, inputs, states, predicted.shards)
        first.followers.add(fit)
        del inputs  # the fit can move them
        solved = fitted(first, lambda: fit.solve(start))
    if solved is start:
        return dict(repaired)
    refitted = dict(repaired)
    for block in family.blocks_of(layer):
        prefix = f"{block.module}."
        weights = {name.removeprefix(prefix): value for name, value in solved.items() if name.startswith(prefix)}
        if weights:
            refitted[block.name] = block_of(family, layer, block, weights, repaired[block.name].bias)
    return refitted


def _joined(batches: Sequence[Tensor], places: Iterable[int]) -> Tensor:
    """Return the batches `(B, T, hidden)` at some places as one. Of some texts, none of the own batches is read."""
    return torch.cat([batches[0][:0], *(batches[place] for place in places)])


@dataclass(eq=False)
class _Fit:
    """One fit: inputs of the last layer and hidden states of the dense model, each `(rows, T, hidden)`: windows of the
    own shards.
    """

    model: PrunableModel
    runner: ModuleRunner
    inputs: Tensor
    predicted: Tensor
    shards: Shards

    def to_host(self) -> None:
        """Move the inputs to the host, with the hidden states of the run."""
        self.inputs = self.inputs.cpu()

    def solve(self, start: Weights) -> Weights:
        """Return weights that predict more like the dense model does on the windows set aside, or `start` itself."""
        set_aside, rest = set_aside_and_trained(self.shards.windows, seed=0)
        if not start or not len(set_aside):
            return start
        steps = epochs_of(rest, self.inputs.shape[1], epochs=1, seed=0)
        candidates = trained(start, steps, LEARNING_RATE, self._set_gradients)
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
                gradients = torch.autograd.grad(states, list(weights.values()), torch.cat(slopes) / tokens)
            add_gradients(weights, gradients)

        def add_slices(rows: Tensor) -> None:
            self.runner.run.run_slices(len(rows), lambda part: add(rows[part]))

        set_gradients(self.shards, weights, windows, add_slices)

    def _states(self, weights: Weights, rows: Tensor) -> Tensor:
        """Return the hidden states behind the final norm `(n · T, hidden)` of some rows, with a graph."""
        device = next(iter(weights.values())).device
        inputs = rows_on(device, self.inputs, rows)
        output = self.runner.output(weights, inputs.to(self._compute_dtype))
        norm, head = self.model.final_norm, self.model.head
        own = next(norm.parameters())
        states: Tensor = norm(output.to(own.device, own.dtype))
        return states.flatten(0, 1).to(next(head.parameters()).device)

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
