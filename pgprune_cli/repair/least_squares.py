"""Closed-form repair: the kept columns of o and down, refitted by least squares to what the whole block put out.

With C = E[x xᵀ] the second moments of the output projection's inputs, collected through the already pruned prefix, and
S the kept columns:   W_S ← (W C[:,S] + λ W_S) (C[S,S] + λ I)⁻¹.   Forward passes and one Cholesky factor a block; only
one layer's moments exist at a time. λ pulls towards the weights as they are, so that no direction that the text does
not excite is changed. Which units of a block stay can be decided again on the same moments, behind the same prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.layerwise import layer_inputs
from pgprune_cli.forward.masked import shrunk_block
from pgprune_cli.forward.moments import Moments, observe_moments
from pgprune_cli.model.prunable import Block, LayerMask, ModelMask, Output, Outputs, Shape, inputs_of
from pgprune_cli.scores.obs import removal_order, units_a_round

PASSES = 2
"""Forward passes over its text that a repair costs at most: one behind the other, to observe and to go on."""


def repaired_output(
    weight: Tensor, bias: Tensor | None, moments: Moments, columns: Tensor, damping: float, with_bias: bool
) -> Output:
    """The output projection on its kept `columns` (int64, ascending), refitted to `weight` `(hidden, in)` on all.

    damping: λ as a fraction of the mean of C's diagonal. with_bias: a constant is fitted too (the moments are centred).
    In float64 throughout. The weighted squared error on the text of the moments is at most that of no repair.
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
    """FLAP's repair (An et al. 2024): the kept columns as they are, the mean of what is gone as a bias."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[columns] = False
    constant = weight[:, gone].double() @ moments.first[gone]
    constant = constant if bias is None else constant + bias.double()
    return Output(weight[:, columns].clone(), constant.to(weight.dtype))


class Repaired(NamedTuple):
    """What stays, and the output projections of every block that lost some but not all of its units."""

    keep: ModelMask
    outputs: Outputs


def repair(
    model: nn.Module,
    keep: ModelMask,
    batches: Sequence[Tensor],
    method: str,
    damping: float,
    reselect: bool = False,
    on_layers: Callable[[int], None] | None = None,
    on_batches: Callable[[int, int], None] | None = None,
) -> Repaired:
    """The output projections of every block that loses units, repaired one after another from the first layer on.

    method: `least-squares`, `least-squares-bias` or `bias`. Each block is observed behind the already pruned and
    repaired ones, which is what it will run behind. With `reselect`, a block keeps as many units as `keep` says, but
    those that `obs` finds there. The model is as it was afterwards. `batches` of tokens `(B, T)`.
    `on_layers(1)` follows each layer, `on_batches(done, of)` the text that goes through all of them before the first.
    """
    shape = Shape.of(model)
    roots = error_roots(model, batches, on_batches) if reselect else None
    stream = layer_inputs(model, batches)
    outputs: dict[tuple[int, str], Output] = {}
    repaired = []
    for index, (layer, wanted) in enumerate(zip(stream.layers, keep, strict=True)):
        masks = {name: wanted.of(name) for name, _ in shape.spec.blocks()}
        with ExitStack() as undo:
            for name, block in shape.spec.blocks():
                if masks[name].all():
                    continue
                if masks[name].any():
                    with ExitStack() as meanwhile:
                        if name == "attention":  # the FFN behind it need not run to see its inputs
                            nothing = torch.zeros_like(wanted.ffn)
                            meanwhile.enter_context(shrunk_block(layer, "ffn", shape.spec.ffn, nothing, None))
                        moments = observe_moments(stream, index, shape, name)
                    if roots:
                        masks[name] = _reselected(layer, block, masks[name], moments, roots[index])
                    outputs[index, name] = _repaired(layer, block, masks[name], moments, method, damping)
                    del moments  # before those of the next block exist
                undo.enter_context(shrunk_block(layer, name, block, masks[name], outputs.get((index, name))))
            stream.advance(index)
        repaired.append(LayerMask(**masks))
        if on_layers is not None:
            on_layers(1)
    return Repaired(tuple(repaired), outputs)


def _reselected(layer: nn.Module, block: Block, mask: Tensor, moments: Moments, root: Tensor) -> Tensor:
    """As many units as `mask` `(units,)` keeps, the last ones that obs would remove."""
    weight = layer.get_submodule(block.output_path).weight
    units = len(mask)
    order, _ = removal_order(root.to(weight.device) @ weight.double(), moments.second, units, units_a_round(units))
    best = torch.zeros_like(mask)
    best[order[units - int(mask.sum()) :].cpu()] = True
    return best


def _repaired(layer: nn.Module, block: Block, mask: Tensor, moments: Moments, method: str, damping: float) -> Output:
    linear = layer.get_submodule(block.output_path)
    weight = linear.weight
    columns = inputs_of(mask.nonzero().squeeze(1).to(weight.device), weight.shape[1] // len(mask))
    if method == "bias":
        return compensated_output(weight, linear.bias, moments, columns)
    return repaired_output(weight, linear.bias, moments, columns, damping, method == "least-squares-bias")


def cholesky(system: Tensor) -> Tensor:
    """Lower factor. Moments in float32 can be a little indefinite: then the ridge grows until they are not.

    Raises RunError where they are not finite.
    """
    if not system.isfinite().all():
        raise RunError("the activations on the calibration text are not finite; try dtype float32 or bfloat16")
    factor, failed = torch.linalg.cholesky_ex(system)
    extra = system.diagonal().mean() * 1e-6
    while failed:
        system = system + extra * torch.eye(len(system), dtype=system.dtype, device=system.device)
        factor, failed = torch.linalg.cholesky_ex(system)
        extra = extra * 10
    return factor
