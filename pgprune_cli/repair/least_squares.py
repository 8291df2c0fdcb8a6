"""Closed-form repair: the kept columns of the output projections, refitted to the output of the whole block.

With C = E[x xᵀ] the second moments of the output projection's inputs, collected behind the already pruned layers, and S
the kept columns:   W_S ← (W C[:,S] + λ W_S) (C[S,S] + λ I)⁻¹.   This takes forward passes and one Cholesky factor per
block, and the moments of one layer at a time. λ pulls towards the original weights, so that no direction that the text
does not excite is changed. The kept units of a block can be chosen again on the same moments, behind the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.errors import RunError
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.layerwise import LayerwiseRun, start_layerwise
from pgprune_cli.forward.masked import shrunk_block
from pgprune_cli.forward.moments import Moments, block_root, observe_moments
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import LayerMask, ModelMask, Output, Outputs, columns_of
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.scores.obs import chain_errors, removal_order, units_per_round

PASSES = 2
"""Forward passes over its text that a repair takes at most: one to observe each block, one to advance."""


class Repaired(NamedTuple):
    """A mask, and the repaired output projections of every block that keeps some but not all of its units."""

    model_mask: ModelMask
    outputs: Outputs


def repair(
    model: PrunableModel,
    model_mask: ModelMask,
    batches: Sequence[Tensor],
    method: str,
    damping: float,
    *,
    reselect: bool = False,
    progress: LayerProgress = NO_PROGRESS,
) -> Repaired:
    """Repair the output projection of every block that loses units, from the first layer on.

    Each block is observed behind the already pruned and repaired ones, as it will run. The model is unchanged
    afterwards.

    Args:
        batches: tokens `(B, T)`.
        method: `least-squares`, `least-squares-bias` or `bias`.
        damping: λ as a fraction of the mean of C's diagonal.
        reselect: keep as many units per block as `model_mask` does, but choose them again with `obs`.
    """
    roots = error_roots(model, batches, progress) if reselect else None
    run = start_layerwise(model, batches)
    outputs: dict[tuple[int, str], Output] = {}
    layer_masks = []
    for index, layer in enumerate(model.layers):
        masks = dict(vars(model_mask[index]))
        with ExitStack() as undo:
            for block in model.family.blocks_of(layer):
                mask = masks[block.name]
                if mask.all():
                    continue
                if mask.any():
                    moments = _moments_behind(model, run, index, block)
                    if roots:
                        root = block_root(model.family, layer, block, roots[index])
                        mask = masks[block.name] = _reselected(model, index, block, mask, moments, root)
                    outputs[index, block.name] = _repaired(layer, block, mask, moments, method, damping)
                    del moments  # before those of the next block exist
                output = outputs.get((index, block.name))
                undo.enter_context(shrunk_block(model.family, layer, block, mask, output))
            run.advance(index)
        layer_masks.append(LayerMask(**masks))
        progress.layer_done()
    return Repaired(tuple(layer_masks), outputs)


def _moments_behind(model: PrunableModel, run: LayerwiseRun, index: int, block: Block) -> Moments:
    """Observe a block behind the pruned layers. The blocks after it in the same layer need not run."""
    family, layer = model.family, model.layers[index]
    with ExitStack() as undo:
        blocks = family.blocks_of(layer)
        for later in blocks[blocks.index(block) + 1 :]:
            nothing = torch.zeros(model.shape.elements[later.name][index], dtype=torch.bool)
            undo.enter_context(shrunk_block(family, layer, later, nothing, None))
        return observe_moments(run, index, family, block)


def _reselected(model: PrunableModel, index: int, block: Block, mask: Tensor, moments: Moments, root: Tensor) -> Tensor:
    """Return a mask of as many elements as `mask` `(elements,)` keeps: the last ones that `obs` would remove.

    In a grid of several groups with several members, it keeps as many groups and as many members of each.
    """
    weight = block.output_linear(model.layers[index]).weight
    weighted = root.to(weight.device) @ weight.double()
    grid = model.shape.grids[block.name][index]
    if not grid.is_line:
        cost, target = model.shape.parameters[block.name][index], grid.kept(mask)
        return chain_errors(weighted, moments.second, grid, cost, target).isinf()
    order, _ = removal_order(weighted, moments.second, len(mask), units_per_round(len(mask)))
    reselected = torch.zeros_like(mask)
    reselected[order[len(mask) - int(mask.sum()) :].cpu()] = True
    return reselected


def _repaired(layer: nn.Module, block: Block, mask: Tensor, moments: Moments, method: str, damping: float) -> Output:
    linear = block.output_linear(layer)
    weight = linear.weight
    columns = columns_of(mask.nonzero().squeeze(1).to(weight.device), weight.shape[1] // len(mask))
    if method == "bias":
        return compensated_output(weight, linear.bias, moments, columns)
    with_bias = method == "least-squares-bias"
    return repaired_output(weight, linear.bias, moments, columns, damping, with_bias=with_bias)


def repaired_output(
    weight: Tensor, bias: Tensor | None, moments: Moments, columns: Tensor, damping: float, *, with_bias: bool
) -> Output:
    """Return the output projection on its kept `columns` (int64, ascending), refitted to `weight` `(hidden, in)`.

    damping: λ as a fraction of the mean of C's diagonal; with_bias: fit a constant too (the moments are centred). The
    computation is in float64. The weighted squared error on the text of the moments is at most that of no repair.
    """
    full = weight.double()
    second = moments.second
    if with_bias:
        second = second - torch.outer(moments.first, moments.first)
    ridge = damping * second.diagonal().mean().clamp_min(1e-30)
    system = second[columns][:, columns] + ridge * torch.eye(len(columns), dtype=torch.float64, device=second.device)
    right = second[columns] @ full.T + ridge * full[:, columns].T
    solution = torch.cholesky_solve(right, cholesky(system)).T
    if not with_bias:
        return Output(solution.to(weight.dtype), bias)
    constant = full @ moments.first - solution @ moments.first[columns]
    constant = constant if bias is None else constant + bias.double()
    return Output(solution.to(weight.dtype), constant.to(weight.dtype))


def compensated_output(weight: Tensor, bias: Tensor | None, moments: Moments, columns: Tensor) -> Output:
    """Return FLAP's repair (An et al. 2024): the kept columns unchanged, and the mean of the removed ones as a bias."""
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[columns] = False
    constant = weight[:, removed].double() @ moments.first[removed]
    constant = constant if bias is None else constant + bias.double()
    return Output(weight[:, columns].clone(), constant.to(weight.dtype))


def cholesky(system: Tensor) -> Tensor:
    """Return the lower Cholesky factor. Moments in float32 can be slightly indefinite: then the ridge is increased.

    Raises RunError if the system is not finite.
    """
    if not system.isfinite().all():
        raise RunError("the activations on the calibration text are not finite. Try dtype float32 or bfloat16.")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    extra = system.diagonal().mean() * 1e-6
    while failed:
        system = system + extra * torch.eye(len(system), dtype=system.dtype, device=system.device)
        factor, failed = torch.linalg.cholesky_ex(system)
        extra = extra * 10
    return factor
