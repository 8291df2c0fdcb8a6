"""The repair: each pruned block is refitted to the output of the whole block, behind the layers already repaired.

The output projection is refitted in closed form (below). `repair.method: sublayer` then trains all kept weights of the
block (`sublayer.py`), and in the end those of the last layers together (`last_layers.py`).

With C = E[x xᵀ] the second moments of the output projection's inputs, collected behind the already pruned layers, and S
the kept columns:   W_S ← (W C[:,S] + λ W_S) (C[S,S] + λ I)⁻¹.   This takes forward passes and one Cholesky factor per
block, and the moments of one layer at a time. λ pulls towards the original weights, so that no direction that the text
does not excite is changed. The kept units of a block can be chosen again on the same moments, behind the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.core.grid import Grid
from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.block_text import BlockRunner, BlockText
from pgprune_cli.forward.curvature import ErrorRoots, error_roots
from pgprune_cli.forward.expert_moments import ExpertMoments
from pgprune_cli.forward.layerwise import NO_OBSERVERS, NO_WATCHERS
from pgprune_cli.forward.moments import Moments, block_root, observe_moments
from pgprune_cli.forward.shards import ShardedRun, start_sharded
from pgprune_cli.forward.shrunk_block import shrunk_block
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import LayerMask, ModelMask, RepairedBlock, RepairedBlocks, columns_of
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.equations import compensated_output, repaired_output
from pgprune_cli.repair.experts import has_too_few_tokens, repaired_experts, reselected_experts
from pgprune_cli.repair.last_layers import Predictions, fit_last_layers, fitted_layers, inputs_of_fit
from pgprune_cli.repair.sublayer import SublayerFit
from pgprune_cli.repair.training import fitted
from pgprune_cli.repair.whole_block import block_of, kept_weights
from pgprune_cli.scores.obs import chain_errors, removal_order, units_per_round

PASSES = 2
"""Forward passes over its text that a repair takes at most: one to observe each block, one to advance."""

COPIES = 3
"""Tensors of the size of all hidden states that exist at the same time while whole blocks are fitted: with what the
block reads and writes."""

Note = Callable[[str], None]


def _no_note(text: str) -> None:
    """Drop a note."""


class Repaired(NamedTuple):
    """A mask, and the repaired weights of every block that keeps some but not all of its units."""

    model_mask: ModelMask
    blocks: RepairedBlocks


def repair(
    model: PrunableModel,
    model_mask: ModelMask,
    batches: Sequence[Tensor],
    method: str,
    damping: float,
    *,
    epochs: int = 0,
    last_layers: int = 0,
    reselect: bool = False,
    roots: ErrorRoots | None = None,
    ranks: Ranks = ALONE,
    progress: LayerProgress = NO_PROGRESS,
    note: Note = _no_note,
) -> Repaired:
    """Repair every block that loses units, from the first layer on: its output projection, or all its kept weights.

    Each block is observed behind the already pruned and repaired ones, as it will run. Only `bias` observes the dense
    model, as FLAP does. The model is unchanged afterwards.

    Args:
        batches: tokens `(B, T)`.
        method: `least-squares`, `least-squares-bias`, `bias` or `sublayer`.
        damping: λ as a fraction of the mean of C's diagonal.
        epochs: how many times `sublayer` reads the text of each block. 0 fits output projections only.
        last_layers: how many layers `sublayer` fits to the dense model's predictions in the end.
        reselect: keep as many units per block as `model_mask` does, but choose them again with `obs`.
        roots: what errors cost a choice, if that is known already.
        ranks: of the processes that call this alike; all get the same blocks.
        note: called with what a user should know about single layers, a line each.
    """
    if reselect:
        roots = roots or error_roots(model, batches, progress, ranks)
    run = start_sharded(model, batches, ranks, copies=COPIES if epochs else 1)
    last = fitted_layers(model, last_layers)
    predicted = Predictions.of(model, batches, run) if last else None
    repaired: dict[tuple[int, str], RepairedBlock] = {}
    layer_masks = []
    for index, layer in enumerate(model.layers):
        masks = dict(vars(model_mask[index]))
        if predicted and index == last.start:
            inputs = inputs_of_fit(run, predicted)
        with ExitStack() as undo:
            for block in model.family.blocks_of(layer):
                mask, own = masks[block.name], None
                if mask.all():
                    continue
                if mask.any():
                    root = block_root(model.family, layer, block, roots[index]) if roots and reselect else None
                    mask, own = _BlockRepair(model, run, index, block, method, damping, epochs, note).solve(mask, root)
                    masks[block.name] = mask
                    if own is not None:
                        repaired[index, block.name] = own
                    if run.shards.is_divided:  # every process continues behind its own copy of the block
                        ranks.check_same(mask, *(own.tensors if own else ()))
                if method != "bias":
                    undo.enter_context(shrunk_block(model.family, layer, block, mask, own))
            layer_masks.append(LayerMask(**masks))
            if index + 1 < len(model.layers):
                run.advance(index)
        if index + 1 < len(model.layers):  # a device need not hold the repaired weights of all layers besides the model
            repaired |= {key: block.on_host() for key, block in repaired.items() if key[0] == index}
        progress.layer_done()
    if predicted:
        fitted_masks = {index: layer_masks[index] for index in last}
        repaired |= fit_last_layers(run, model, fitted_masks, repaired, inputs, predicted, progress)
    return Repaired(tuple(layer_masks), repaired)


@dataclass(frozen=True)
class _BlockRepair:
    """The repair of one block of layer `index`, behind the already pruned layers. See `repair` for the other fields."""

    model: PrunableModel
    run: ShardedRun
    index: int
    block: Block
    method: str
    damping: float
    epochs: int
    note: Note

    @property
    def layer(self) -> nn.Module:
        return self.model.layers[self.index]

    @property
    def grid(self) -> Grid:
        return self.model.shape.grids[self.block.name][self.index]

    def solve(self, mask: Tensor, root: Tensor | None) -> tuple[Tensor, RepairedBlock | None]:
        """Return the mask `(elements,)`, chosen again if R is given, and the repaired output projection, if any."""
        return self._experts(mask, root) if self.grid.separate else self._one_projection(mask, root)

    def _one_projection(self, mask: Tensor, root: Tensor | None) -> tuple[Tensor, RepairedBlock]:
        text = BlockText(self.run.runs, self.model.family, self.block) if self.epochs else None
        moments = self._moments(text=text)
        assert isinstance(moments, Moments)
        if root is not None:
            mask = self._reselected(mask, moments, root)
        repaired = self._output(mask, moments)
        del moments  # the fit needs its memory
        return mask, repaired if text is None else self._whole_block(mask, repaired, text)

    def _whole_block(self, mask: Tensor, repaired: RepairedBlock, text: BlockText) -> RepairedBlock:
        """Refit every kept weight of the block, from its repaired output projection on."""
        family, layer, run = self.model.family, self.layer, self.run.runs[0]

        def refitted() -> RepairedBlock:
            start = kept_weights(family, layer, self.block, mask, repaired)
            runner = BlockRunner(run, self.index, family, self.block, self.grid.kept(mask))
            solved = SublayerFit(runner, text, self.run.shards, self.epochs, self.index).solve(start)
            return repaired if solved is start else block_of(family, layer, self.block, solved, repaired.bias)

        return fitted(run, refitted)

    def _output(self, mask: Tensor, moments: Moments) -> RepairedBlock:
        """Return the repaired output projection on the kept elements."""
        linear = self.block.output_linear(self.layer)
        weight = linear.weight
        columns = columns_of(mask.nonzero().squeeze(1).to(weight.device), weight.shape[1] // len(mask))
        if self.method == "bias":
            return compensated_output(weight, linear.bias, moments, columns)
        with_bias = self.method == "least-squares-bias"
        return repaired_output(weight, linear.bias, moments, columns, self.damping, with_bias=with_bias)

    def _experts(self, mask: Tensor, root: Tensor | None) -> tuple[Tensor, RepairedBlock | None]:
        """Fit each expert to the tokens that the router sends to it once the others are removed."""
        family, layer, grid = self.model.family, self.layer, self.grid
        if root is not None:
            moments = self._moments()
            assert isinstance(moments, ExpertMoments)
            mask = reselected_experts(family, layer, mask, grid, moments, root)
        if self.method == "bias" or grid.kept(mask)[1] == grid.members:
            return mask, None  # an expert that keeps all its channels needs no repair
        if root is None or not grid.kept_groups(mask).all():
            moments = self._moments(grid.kept_groups(mask).nonzero().squeeze(1))
        assert isinstance(moments, ExpertMoments)
        if few := has_too_few_tokens(moments, mask, grid):
            kept, names = grid.kept(mask)[0], ", ".join(map(str, few))
            self.note(
                f"layer {self.index}: {len(few)} of {kept} experts saw too few tokens and keep their weights: {names}"
            )
        return mask, repaired_experts(family, layer, mask, grid, moments, self.damping)

    def _moments(self, experts: Tensor | None = None, text: BlockText | None = None) -> Moments | ExpertMoments:
        """Observe the block as it will run. The blocks after it in the same layer need not run.

        experts: what a router chooses among, `(g,)` int64, all of them by default; text: filled on the same pass.
        """
        family = self.model.family
        with ExitStack() as undo:
            blocks = family.blocks_of(self.layer)
            for later in blocks[blocks.index(self.block) + 1 :]:
                nothing = torch.zeros(self.model.shape.elements[later.name][self.index], dtype=torch.bool)
                undo.enter_context(shrunk_block(family, self.layer, later, nothing, None))
            observers, watchers = (text.observers, text.watchers) if text else (NO_OBSERVERS, NO_WATCHERS)
            return observe_moments(self.run, self.index, family, self.block, experts, observers, watchers)

    def _reselected(self, mask: Tensor, moments: Moments, root: Tensor) -> Tensor:
        """Return a mask of as many elements as `mask` `(elements,)` keeps: the last ones that `obs` would remove.

        In a grid of several groups with several members, it keeps as many groups and as many members of each.
        """
        weight = self.block.output_linear(self.layer).weight
        weighted = root.to(weight.device) @ weight.to(root.dtype)
        if not self.grid.is_line:
            cost, target = self.model.shape.parameters[self.block.name][self.index], self.grid.kept(mask)
            return chain_errors(weighted, moments.second, self.grid, cost, target).isinf()
        order, _ = removal_order(weighted, moments.second, len(mask), units_per_round(len(mask)))
        reselected = torch.zeros_like(mask)
        reselected[order[len(mask) - int(mask.sum()) :]] = True
        return reselected
