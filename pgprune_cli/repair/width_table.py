"""The width table: every block solved at many widths before the search.

A width search evaluates masks with their repair, and a repair takes minutes. So each block of the dense model is solved
once, as if it alone were pruned, at a grid of widths. Units are removed in the order of their scores. With the units in
that order in C, one Cholesky factor serves all widths, because the factor of a leading submatrix is the leading
submatrix of the factor (see least_squares.py for the equations).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.core.grid import Grid, element_order, unit_multiple
from pgprune_cli.core.space import MaskSpace
from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.curvature import ErrorRoots, error_roots
from pgprune_cli.forward.expert_moments import ExpertMoments
from pgprune_cli.forward.moments import Moments, block_root, dense_moments
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import ModelMask, RepairedBlock, RepairedBlocks, columns_of
from pgprune_cli.model.prunable import Partitions, PrunableModel
from pgprune_cli.repair.equations import WidthProblem, solve_prefixes
from pgprune_cli.repair.experts import solve_expert_widths
from pgprune_cli.scores.obs import bias_error

WIDTH_STEPS = 16
"""How many widths of a block a search chooses among, at most: multiples of about a sixteenth of its units."""

TILE = 32
"""Rows that a matrix product takes at a time: with bfloat16 instructions, a CPU is half as fast again at multiples."""

TIE = 1e-6
"""Nats of priority between the first and the last unit of a layer whose gains are all equal."""

NO_MULTIPLES: Mapping[str, int] = {}


@dataclass(frozen=True)
class BlockWidths:
    """One block at many widths, on the CPU.

    errors: of keeping 0, 1, … units, `(units + 1,)` float64, relative to the residual stream, interpolated between the
    solved widths; order: the units `(units,)` in which they are kept, first to last; weights: by the number of kept
    elements at a solved width, the output projection on the first units of the order, transposed: `(inputs, hidden)`,
    inputs in the order of `element_order`; of experts, as the model stores it, and only where they lose channels. Empty
    without repair.
    """

    errors: Tensor
    order: Tensor
    weights: Mapping[int, Tensor]


@dataclass(frozen=True)
class WidthTable:
    """Every block at many widths, as if it alone were pruned: the error of each width, and its repaired projection.

    errors, orders: by (layer, block), as in `BlockWidths`; repaired: by (layer, block) and number of kept elements, the
    projection on the first units of the order, for a model whose elements lie in the order of `element_order`. Empty
    without repair.
    """

    errors: Mapping[tuple[int, str], Tensor]
    orders: Mapping[tuple[int, str], Tensor]
    repaired: Mapping[tuple[int, str], Mapping[int, RepairedBlock]]

    @classmethod
    def of(cls, model: PrunableModel, layers: Mapping[int, Mapping[str, BlockWidths]]) -> WidthTable:
        """Collect the solved blocks of a model, layer by layer."""
        errors, orders, repaired = {}, {}, {}
        for index, solved in layers.items():
            for name in model.shape.grids:
                key = (index, name)
                if name not in solved:  # not searched, or a block that the layer lacks
                    errors[key], orders[key] = torch.zeros(1, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
                    continue
                widths = solved[name]
                errors[key], orders[key] = widths.errors, widths.order
                if widths.weights:
                    make = _expert_output if model.shape.grids[name][index].separate else _linear_output
                    layer, block = model.layers[index], model.shape.blocks[index][name]
                    repaired[key] = {kept: make(layer, block, weight) for kept, weight in widths.weights.items()}
        return cls(errors, orders, repaired)

    def priorities(self, space: MaskSpace) -> Tensor:
        """Return log(error that removing a unit adds / its cost), `(n,)` float64, falling along every layer's order.

        The errors are those of the lower convex hull: a width above it is never the best that its cost buys.
        """
        parts = []
        for family in space.families:
            for index in range(len(family.counts)):
                order, costs = self.orders[index, family.name], family.layer_costs(index).double()
                gains = _falling(self.errors[index, family.name].diff().neg(), costs[order])
                # Strictly falling: with ties, a mask would keep units that the projection of its width does not fit.
                priority = torch.empty_like(gains)
                priority[order] = gains.clamp_min(1e-30).log() - torch.linspace(0.0, TIE, len(gains))
                parts.append(priority)
        return torch.cat(parts)

    def errors_of(self, masks: Tensor, space: MaskSpace) -> Tensor:
        """Return the error of every (family, layer) under masks `(K, n)`, from their widths: `(K, J)` float64."""
        widths = [part.sum(1) for part in masks.split(space.pair_counts.tolist(), dim=1)]
        keys = [(index, family.name) for family in space.families for index in range(len(family.counts))]
        return torch.stack([self.errors[key][width] for key, width in zip(keys, widths, strict=True)], dim=1)

    def repaired_for(self, model_mask: ModelMask) -> RepairedBlocks:
        """Return the repaired projections for a mask along the orders, at solved widths. Whole and empty blocks have
        none."""
        repaired: dict[tuple[int, str], RepairedBlock] = {}
        for (index, name), by_width in self.repaired.items():
            mask = model_mask[index].of(name)
            kept = int(mask.sum())
            if 0 < kept < len(mask) and kept in by_width:
                repaired[index, name] = by_width[kept]
        return repaired


def width_step(units: int, multiple: int = 1) -> int:
    """Return the distance between the widths in the table for a block of `units` units: a multiple of `multiple`.

    A wide block's is also a multiple of `TILE`.
    """
    step = max(-(-units // (WIDTH_STEPS * multiple)), 1) * multiple
    tile = math.lcm(TILE, multiple)
    return step if step < tile else -(-step // tile) * tile


def table_bytes(model: PrunableModel, partitions: Partitions, multiples: Mapping[str, int] = NO_MULTIPLES) -> int:
    """Return the bytes of all repaired projections: every block at every width between none and all of its units.

    The order of equally costly units is taken as it comes.
    """
    total = 0
    for index, layer in enumerate(model.layers):
        for block in model.family.blocks_of(layer):
            if (index, block.name) not in partitions:
                continue
            grid = model.shape.grids[block.name][index]
            elements = partitions[index, block.name].bincount().cumsum(0).tolist()
            multiple = unit_multiple(grid, multiples.get(block.name, 1))
            solved = range(0, len(elements), width_step(len(elements), multiple))
            kept = sum(elements[width - 1] for width in solved if width)
            total += kept * model.family.output_size(layer, block) // elements[-1]
    return total * model.dtype.itemsize


def solve_layers(
    model: PrunableModel,
    ranks_of_units: Mapping[tuple[int, str], Tensor],
    partitions: Partitions,
    batches: Sequence[Tensor],
    damping: float,
    *,
    solve: bool,
    multiples: Mapping[str, int] = NO_MULTIPLES,
    only: Collection[int] | None = None,
    roots: ErrorRoots | None = None,
    ranks: Ranks = ALONE,
    progress: LayerProgress = NO_PROGRESS,
) -> Iterator[tuple[int, dict[str, BlockWidths]]]:
    """Solve every block of the dense model at every width, from one pass over the text. Yields layer after layer.

    Memory: the moments and projections of one layer.

    Args:
        ranks_of_units: by (layer, block), a number per unit; units are removed by rising number. Blocks without are
            left out.
        partitions: the unit of every element of these blocks.
        batches: tokens `(B, T)`.
        damping: as in `repair`.
        solve: fit the projections; without it, the errors are those of the removal alone.
        multiples: by block name, what its widths are multiples of.
        only: if given, solve just these layers.
        roots: what errors cost, if that is known already.
        ranks: as in `dense_moments`.
    """
    family = model.family
    roots = roots or error_roots(model, batches, progress)

    def blocks_of(index: int) -> list[Block]:
        return [block for block in family.blocks_of(model.layers[index]) if (index, block.name) in ranks_of_units]

    for index, collector in dense_moments(model, batches, blocks_of, only, ranks):
        layer, root = model.layers[index], roots[index]
        solved: dict[str, BlockWidths] = {}
        for block in blocks_of(index):
            order = ranks_of_units[index, block.name].argsort(descending=True, stable=True)
            multiple = unit_multiple(model.shape.grids[block.name][index], multiples.get(block.name, 1))
            widths = sorted({*range(0, len(order), width_step(len(order), multiple)), len(order)})
            moments, own_root = collector.moments(block.name), block_root(family, layer, block, root)
            problem = WidthProblem(order, partitions[index, block.name], widths, own_root, damping)
            if isinstance(moments, ExpertMoments):
                errors, weights = solve_expert_widths(family, layer, moments, problem, solve=solve)
            else:
                grid = model.shape.grids[block.name][index]
                errors, weights = _solve_widths(block.output_linear(layer), grid, moments, problem, solve=solve)
            del moments  # before those of the next layer exist
            errors = _interpolated(torch.tensor(widths), errors, len(order))
            solved[block.name] = BlockWidths(errors, order, weights)
        yield index, solved


def _solve_widths(
    linear: nn.Linear, grid: Grid, moments: Moments, problem: WidthProblem, *, solve: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the errors of the widths `(widths,)`, and the projections by number of kept elements: see BlockWidths."""
    order, partition, widths, root, damping = problem
    width = linear.weight.shape[1] // len(partition)
    elements = order.argsort()[partition].argsort(stable=True)  # unit after unit, in the order in which they are kept
    elements_at = [0, *partition.bincount()[order].cumsum(0).tolist()]  # by width
    columns = columns_of(elements.to(moments.second.device), width)
    counts = [elements_at[kept] * width for kept in widths]
    errors, weights = solve_prefixes(linear.weight, moments.second, columns, counts, root, damping, solve=solve)
    if linear.bias is not None:  # it is removed with the last unit
        errors[0] += bias_error(linear.weight, linear.bias, moments.first, root.to(linear.weight.device))
    place = element_order(partition, order, grid).argsort()[elements]
    if not torch.equal(place, torch.arange(len(place))):  # several KV heads lose one query head each in a step
        for inputs in weights:
            kept = columns_of(place[: inputs // width].argsort(), width)
            weights[inputs] = weights[inputs][kept]
    return errors * float(moments.weight), {inputs // width: weight for inputs, weight in weights.items()}


def _linear_output(layer: nn.Module, block: Block, weight: Tensor) -> RepairedBlock:
    return RepairedBlock(weight.T, block.output_linear(layer).bias)


def _expert_output(_: nn.Module, __: Block, weight: Tensor) -> RepairedBlock:
    return RepairedBlock(weight, None)


def _interpolated(widths: Tensor, errors: Tensor, count: int) -> Tensor:
    """Return the errors of 0, 1, … `count` units from those of some ascending widths: `(count + 1,)`."""
    at = torch.arange(count + 1)
    right = torch.searchsorted(widths, at).clamp_min(1)
    left = right - 1
    share = (at - widths[left]) / (widths[right] - widths[left])
    return errors[left] + share * (errors[right] - errors[left])


def _falling(gains: Tensor, costs: Tensor) -> Tensor:
    """Return gain per cost `(n,)`, never rising: the mean replaces a rising run (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # gain, cost and number of units
    for gain, cost in zip(gains.tolist(), costs.tolist(), strict=True):
        size = 1
        while pools and pools[-1][0] * cost < gain * pools[-1][1]:
            pool_gain, pool_cost, pool_size = pools.pop()
            gain, cost, size = pool_gain + gain, pool_cost + cost, pool_size + size
        pools.append((gain, cost, size))
    means = torch.tensor([gain / cost for gain, cost, _ in pools], dtype=torch.float64)
    return means.repeat_interleave(torch.tensor([size for _, _, size in pools], dtype=torch.int64))
