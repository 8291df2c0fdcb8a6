"""Every block at many widths, solved beforehand: what a search over widths is made of.

A search evaluates masks repaired, and a repair takes minutes. So each block of the dense model is solved once, as if it
alone were cut, at every width of a grid: units go in the order of a metric, and with the kept units first in C one
Cholesky factor serves all widths, that of a leading block being the leading block of the factor (repair.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgprune_cli.core.space import MaskSpace
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.layerwise import layer_inputs
from pgprune_cli.forward.moments import MomentCollector, Moments
from pgprune_cli.model.prunable import ModelMask, Output, Outputs, Shape, inputs_of
from pgprune_cli.repair.least_squares import cholesky

WIDTH_STEPS = 16
"""Widths of a block that a search chooses among: multiples of a sixteenth of its units."""

TIE = 1e-6
"""Nats of priority between the first and the last of a layer's units where all their gains are equal."""


@dataclass(frozen=True)
class BlockWidths:
    """One block at many widths, on the CPU.

    errors: of keeping 0, 1, … units, `(count + 1,)` float64, relative to the residual stream, interpolated between the
    widths that were solved for; order: the units `(count,)` by falling scores; weights: by solved width the output
    projection on the first units of the order, transposed: `(inputs, hidden)`, inputs ascending; none without repair.
    """

    errors: Tensor
    order: Tensor
    weights: Mapping[int, Tensor]


@dataclass(frozen=True)
class WidthTable:
    """Every block at many widths, as if it alone were cut: what each costs, and its repaired output projection.

    errors, orders: per (layer, block), as in `BlockWidths`; outputs: per (layer, block) and solved width the projection
    on the first units of the order; empty without repair.
    """

    errors: Mapping[tuple[int, str], Tensor]
    orders: Mapping[tuple[int, str], Tensor]
    outputs: Mapping[tuple[int, str], Mapping[int, Output]]

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[int, Mapping[str, BlockWidths]]) -> WidthTable:
        """What was solved of a model's blocks, layer by layer."""
        spec = Shape.of(model).spec
        errors, orders, outputs = {}, {}, {}
        for index, found in layers.items():
            layer = model.get_submodule(spec.layers).get_submodule(str(index))
            for name, block in spec.blocks():
                if name not in found:
                    continue
                errors[index, name], orders[index, name] = found[name].errors, found[name].order
                linear = layer.get_submodule(block.output_path)
                assert isinstance(linear, nn.Linear)
                if weights := found[name].weights:
                    device = next(linear.parameters()).device
                    outputs[index, name] = {
                        kept: Output(_close_to(device, weight).T, linear.bias) for kept, weight in weights.items()
                    }
        return cls(errors, orders, outputs)

    def priorities(self, space: MaskSpace) -> Tensor:
        """log of (error that a unit's removal adds / its cost), `(n,)` float64: falling along every layer's order.

        Of the curve's lower convex hull: a width above it is never the best that its cost buys.
        """
        parts = []
        for family in space.families:
            for index, cost in enumerate(family.costs):
                gains = _falling(self.errors[index, family.name].diff().neg()).clamp_min(1e-30) / cost
                # Strictly: with a tie a sample would keep units that the projection of its width is not made for.
                place = torch.empty_like(gains)
                place[self.orders[index, family.name]] = gains.log() - torch.linspace(0.0, TIE, len(gains))
                parts.append(place)
        return torch.cat(parts)

    def errors_of(self, masks: Tensor, space: MaskSpace) -> Tensor:
        """What every (family, layer) loses under masks `(K, n)`, by their widths: `(K, J)` float64."""
        widths = [part.sum(1) for part in masks.split(space.pair_counts.tolist(), dim=1)]
        keys = [(index, family.name) for family in space.families for index in range(len(family.counts))]
        return torch.stack([self.errors[key][width] for key, width in zip(keys, widths, strict=True)], dim=1)

    def outputs_for(self, keep: ModelMask) -> Outputs:
        """The repaired projections for a decision along the orders and at solved widths; none for whole or empty
        blocks."""
        found: dict[tuple[int, str], Output] = {}
        for (index, name), at_widths in self.outputs.items():
            mask = keep[index].of(name)
            if mask.any() and not mask.all():
                found[index, name] = at_widths[int(mask.sum())]
        return found


def width_step(count: int, multiple: int = 1) -> int:
    """The step between the widths that a table holds of a block with `count` units, a multiple of `multiple`."""
    return -(-count // (WIDTH_STEPS * multiple)) * multiple


def solved_layers(
    model: nn.Module,
    scores: Mapping[tuple[int, str], Tensor],
    batches: Sequence[Tensor],
    damping: float,
    solve: bool,
    ffn_multiple: int = 1,
    only: Collection[int] | None = None,
    on_batches: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, dict[str, BlockWidths]]]:
    """Solves every block of the dense model at every level, from one pass over `batches` of tokens `(B, T)`.

    `scores` per (layer, block) gives the order in which units go. Without `solve` the errors are those of the removal
    alone. FFN widths are multiples of `ffn_multiple`. `only` of these layers; the others just run. Gives layer after
    layer what was solved, in the model's dtype. Memory: one layer's moments and projections. `on_batches(done, of)` is
    told of those that go through all layers before the first is solved.
    """
    shape = Shape.of(model)
    roots = error_roots(model, batches, on_batches)
    stream = layer_inputs(model, batches)
    for index, layer in enumerate(stream.layers):
        if only is not None and index not in only:
            if index < max(only, default=-1):
                stream.advance(index)
            continue
        collector = MomentCollector(shape, [name for name, _ in shape.spec.blocks() if (index, name) in scores])
        stream.advance(index, collector.watch)
        blocks: dict[str, BlockWidths] = {}
        for name, block in shape.spec.blocks():
            if (index, name) not in scores:
                continue
            linear = layer.get_submodule(block.output_path)
            assert isinstance(linear, nn.Linear)
            order = scores[index, name].argsort(descending=True, stable=True)
            level = width_step(len(order), ffn_multiple if name == "ffn" else 1)
            moments = collector.moments(name)
            blocks[name] = _solve_widths(linear, moments, order, level, roots[index], damping, solve)
            del moments  # before those of the next layer exist
        yield index, blocks


def _solve_widths(
    linear: nn.Linear, moments: Moments, order: Tensor, level: int, root: Tensor, damping: float, solve: bool
) -> BlockWidths:
    dtype, weight, count = linear.weight.dtype, linear.weight.double(), len(order)
    second, root = moments.second, root.to(weight.device)
    width = weight.shape[1] // count
    columns = inputs_of(order.to(second.device), width)
    ridge = damping * second.diagonal().mean().clamp_min(1e-30)
    ordered = second[columns][:, columns] + ridge * torch.eye(len(columns), dtype=torch.float64, device=second.device)
    kept_first = weight[:, columns]
    felt = root @ kept_first
    whole = (felt @ ordered * felt).sum()
    factor = cholesky(ordered)
    forward = torch.linalg.solve_triangular(factor, ordered @ kept_first.T, upper=False)  # (in, hidden)
    explained = (forward @ root).square().sum(1).cumsum(0)
    widths = sorted({*range(0, count, level), count})
    points, weights = [], {}
    for kept in widths:
        some = kept * width
        if solve:
            points.append(whole - explained[some - 1] if some else whole)
            if 0 < kept < count:
                solution = torch.linalg.solve_triangular(factor[:some, :some].T, forward[:some], upper=True)
                ascending = columns[:some].argsort()
                weights[kept] = solution[ascending].to(dtype).cpu()
        else:
            rest = felt[:, some:]
            points.append((rest @ ordered[some:, some:] * rest).sum())
    errors = _interpolated(torch.tensor(widths), (torch.stack(points) * moments.weight).cpu(), count)
    return BlockWidths(errors, order, weights)


def _close_to(device: torch.device, weight: Tensor) -> Tensor:
    """On the GPU where steps use it as long as half of that is free: a copy takes longer than a product."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free > total // 2:
            return weight.to(device)
    return weight


def _interpolated(widths: Tensor, points: Tensor, count: int) -> Tensor:
    at = torch.arange(count + 1)
    right = torch.searchsorted(widths, at).clamp_min(1)
    left = right - 1
    share = (at - widths[left]) / (widths[right] - widths[left])
    return points[left] + share * (points[right] - points[left])


def _falling(gains: Tensor) -> Tensor:
    """The nearest `(count,)` that never rises: runs that do are replaced by their mean (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for gain in gains.tolist():
        mean, size = gain, 1
        while pools and pools[-1][0] < mean:
            before, members = pools.pop()
            mean, size = (before * members + mean * size) / (members + size), members + size
        pools.append((mean, size))
    means, sizes = zip(*pools, strict=True) if pools else ((), ())
    return torch.tensor(means, dtype=torch.float64).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
