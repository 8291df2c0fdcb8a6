"""Closed-form repair: the kept columns of o and down, refitted by least squares to what the whole block put out.

With C = E[x xᵀ] the second moments of the output projection's inputs, collected through the already pruned prefix, and
S the kept columns:   W_S ← (W C[:,S] + λ W_S) (C[S,S] + λ I)⁻¹.   Forward passes and one Cholesky factor a block; only
one layer's moments exist at a time. λ pulls towards the weights as they are, so that no direction that the text does
not excite is changed. A token counts by 1 / ‖its residual stream‖²: what follows is normalised, and the attention
sinks, a thousand times as large as other tokens, would be all that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgprune_cli.arch import Block, Keep, Output, Outputs, Shape
from pgprune_cli.core.space import MaskSpace
from pgprune_cli.core.widths import FEW
from pgprune_cli.streaming import Stream, Watch, layer_inputs
from pgprune_cli.substrate import shrunk_block

LEVELS = 16
"""Widths of a block that a search chooses among: multiples of a sixteenth of its units."""

TIE = 1e-6
"""Nats of priority between the first and the last of a layer's units where all their gains are equal."""

PASSES = 2
"""Forward passes over its text that a repair costs at most: one behind the other, to observe and to go on."""


@dataclass(frozen=True)
class Moments:
    """Of the inputs of one output projection, weighted means over tokens: second `(in, in)`, first `(in,)`, float64.

    weight: the tokens' mean weight, a float64 scalar; times it, an error is relative to the residual stream.
    """

    second: Tensor
    first: Tensor
    weight: Tensor | float = 1.0


class _Collector:
    """Watches one layer run and sums the moments of some of its blocks."""

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        blocks = dict(shape.spec.blocks())
        self.outputs = {name: f"{blocks[name].module}.{blocks[name].output.name}" for name in names}
        self.norm = shape.spec.ffn.norm
        self.pending: Tensor | None = None
        self.weight = torch.empty(0)
        self.sums: dict[str, Moments] = {}
        self.total = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    @property
    def watch(self) -> Watch:
        # The norm in front of the FFN reads the residual stream after attention: after the inputs of o, before down's.
        watch: dict[str, Callable[[Tensor], None]] = {self.norm: self._residual}
        if "attention" in self.outputs:
            watch[self.outputs["attention"]] = self._wait
        if "ffn" in self.outputs:
            watch[self.outputs["ffn"]] = lambda inputs: self._add("ffn", inputs)
        return watch

    def moments(self, name: str) -> Moments:
        sums = self.sums[name]
        return Moments(sums.second / self.total, sums.first / self.total, self.total / self.tokens)

    def _wait(self, inputs: Tensor) -> None:
        self.pending = inputs

    def _residual(self, residual: Tensor) -> None:
        squares = residual.flatten(0, -2).float().square().mean(-1, keepdim=True)
        self.weight = squares.clamp_min(1e-12).reciprocal()
        self.total = self.total.to(squares.device) + self.weight.sum().double()
        self.tokens += len(squares)
        if self.pending is not None:
            self._add("attention", self.pending)
            self.pending = None

    def _add(self, name: str, inputs: Tensor) -> None:
        x = inputs.flatten(0, -2).float()
        heavy = x * self.weight
        second, first = (heavy.T @ x).double(), heavy.sum(0).double()
        before = self.sums.get(name)
        if before is not None:
            second, first = before.second.add_(second), before.first.add_(first)
        self.sums[name] = Moments(second, first)


def observe_moments(stream: Stream, index: int, shape: Shape, name: str) -> Moments:
    """Moments of the inputs of the output projection of block `name` in layer `index`, over all of the stream.

    Runs the layer as it is now and leaves the stream where it was.
    """
    collector = _Collector(shape, [name])
    stream.observe(index, collector.watch)
    return collector.moments(name)


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
    solution = torch.cholesky_solve(right, _factor(system)).T
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


def repair(model: nn.Module, keep: Keep, batches: Iterable[Tensor], method: str, damping: float) -> Outputs:
    """The output projections of every block that loses units, repaired one after another from the first layer on.

    method: `least-squares`, `least-squares-bias` or `bias`. Each block is observed behind the already pruned and
    repaired ones, which is what it will run behind. The model is as it was afterwards. `batches` of tokens `(B, T)`.
    """
    shape = Shape.of(model)
    stream = layer_inputs(model, batches)
    outputs: Outputs = {}
    for index, (layer, kept) in enumerate(zip(stream.layers, keep, strict=True)):
        with ExitStack() as undo:
            for name, block in shape.spec.blocks():
                mask = kept.of(name)
                if mask.all():
                    continue
                if mask.any():
                    with ExitStack() as meanwhile:
                        if name == "attention":  # the FFN behind it need not run to see its inputs
                            nothing = torch.zeros_like(kept.ffn)
                            meanwhile.enter_context(shrunk_block(layer, "ffn", shape.spec.ffn, nothing, None))
                        moments = observe_moments(stream, index, shape, name)
                    outputs[index, name] = _repaired(layer, block, mask, moments, method, damping)
                    del moments  # before those of the next block exist
                undo.enter_context(shrunk_block(layer, name, block, mask, outputs.get((index, name))))
            stream.advance(index)
    return outputs


def _repaired(layer: nn.Module, block: Block, mask: Tensor, moments: Moments, method: str, damping: float) -> Output:
    linear = layer.get_submodule(f"{block.module}.{block.output.name}")
    columns = _columns(mask.nonzero().squeeze(1), len(mask), linear.weight.shape[1]).to(linear.weight.device)
    if method == "bias":
        return compensated_output(linear.weight, linear.bias, moments, columns)
    return repaired_output(linear.weight, linear.bias, moments, columns, damping, method == "least-squares-bias")


@dataclass(frozen=True)
class WidthTable:
    """Every block at many widths, as if it alone were cut: what each costs, and its repaired output projection.

    errors: per (layer, block) the error `(count + 1,)` float64 of keeping 0, 1, … units, relative to the residual
    stream, interpolated between the widths that were solved for; orders: the units `(count,)` by falling saliency;
    outputs: per (layer, block) with many units and per solved width the projection on the first units of the order;
    solve: per (layer, block) with few units what repairs any mask of them. Neither is filled without repair.
    """

    errors: Mapping[tuple[int, str], Tensor]
    orders: Mapping[tuple[int, str], Tensor]
    outputs: Mapping[tuple[int, str], Mapping[int, Output]]
    solve: Mapping[tuple[int, str], Callable[[Tensor], Output]]

    def priorities(self, space: MaskSpace) -> Tensor:
        """log of (error that a unit's removal adds / its cost), `(n,)` float64: falling along every layer's order."""
        parts = []
        for family in space.families:
            for index, cost in enumerate(family.costs):
                errors = self.errors[index, family.name]
                gains = (errors[:-1] - errors[1:]).clamp_min(1e-30) / cost
                # A unit removed later never counts less than one before it: the order is kept whatever the offsets.
                gains = gains.flip(0).cummax(0).values.flip(0)
                # Strictly, too: with a tie a sample would keep units that the projection of its width is not made for.
                place = torch.empty_like(gains)
                place[self.orders[index, family.name]] = gains.log() - torch.linspace(0.0, TIE, len(gains))
                parts.append(place)
        return torch.cat(parts)

    def outputs_for(self, keep: Keep) -> Outputs:
        """The repaired projections for a decision; none for whole or empty blocks.

        Blocks of many units are at a solved width, along their order.
        """
        found: Outputs = {}
        for index, name in self.outputs.keys() | self.solve.keys():
            mask = keep[index].of(name)
            if not mask.any() or mask.all():
                continue
            if solve := self.solve.get((index, name)):
                found[index, name] = solve(mask)
            else:
                found[index, name] = self.outputs[index, name][int(mask.sum())]
        return found


def level_of(count: int) -> int:
    """The step between the widths that a table holds of a block with `count` units."""
    return -(-count // LEVELS)


def width_table(
    model: nn.Module, saliency: Mapping[tuple[int, str], Tensor], batches: Iterable[Tensor], damping: float, solve: bool
) -> WidthTable:
    """Solves every block of the dense model at every level, from one pass over `batches` of tokens `(B, T)`.

    `saliency` per (layer, block) gives the order in which units go. With the kept units first in C, one Cholesky
    factor serves all widths: that of a leading block is the leading block of the factor. Without `solve` the errors
    are those of the removal alone. Memory: one layer's moments, and the outputs on the CPU in the model's dtype; of a
    block with few units the moments, for masks that are no leading part of the order.
    """
    shape = Shape.of(model)
    stream = layer_inputs(model, batches)
    errors, orders, outputs, solvers = {}, {}, {}, {}
    for index, layer in enumerate(stream.layers):
        collector = _Collector(shape, [name for name, _ in shape.spec.blocks() if (index, name) in saliency])
        stream.advance(index, collector.watch)
        for name, block in shape.spec.blocks():
            if (index, name) not in saliency:
                continue
            linear = layer.get_submodule(f"{block.module}.{block.output.name}")
            order = saliency[index, name].argsort(descending=True, stable=True)
            moments = collector.moments(name)
            key = index, name
            orders[key] = order
            errors[key], at_levels = _solve_levels(linear, moments, order, damping, solve)
            if solve and len(order) <= FEW:
                solvers[key] = _Solver(linear, moments, damping)
            elif solve:
                outputs[key] = at_levels
    return WidthTable(errors, orders, outputs, solvers)


class _Solver:
    """Repairs any mask of one block's few units; remembers what it has solved."""

    def __init__(self, linear: nn.Module, moments: Moments, damping: float) -> None:
        self.linear, self.moments, self.damping = linear, moments, damping
        self.known: dict[tuple[bool, ...], Output] = {}

    def __call__(self, mask: Tensor) -> Output:
        key = tuple(mask.tolist())
        if key not in self.known:
            weight, bias = self.linear.weight, self.linear.bias
            columns = _columns(mask.nonzero().squeeze(1), len(mask), weight.shape[1]).to(weight.device)
            self.known[key] = repaired_output(weight, bias, self.moments, columns, self.damping, False)
        return self.known[key]


def _solve_levels(
    linear: nn.Module, moments: Moments, order: Tensor, damping: float, solve: bool
) -> tuple[Tensor, dict[int, Output]]:
    weight, count = linear.weight.double(), len(order)
    second = moments.second
    width = weight.shape[1] // count
    level = level_of(count)
    columns = _columns(order, count, weight.shape[1]).to(second.device)
    ridge = damping * second.diagonal().mean().clamp_min(1e-30)
    ordered = second[columns][:, columns] + ridge * torch.eye(len(columns), dtype=torch.float64, device=second.device)
    kept_first = weight[:, columns]
    whole = (kept_first @ ordered * kept_first).sum()
    factor = _factor(ordered)
    forward = torch.linalg.solve_triangular(factor, ordered @ kept_first.T, upper=False)  # (in, hidden)
    widths = sorted({*range(0, count, level), count})
    points, outputs = [], {}
    for kept in widths:
        some = kept * width
        if solve:
            points.append(whole - forward[:some].square().sum())
            if 0 < kept < count:
                solution = torch.linalg.solve_triangular(factor[:some, :some].T, forward[:some], upper=True)
                ascending = columns[:some].argsort()
                outputs[kept] = Output(solution[ascending].T.to(linear.weight.dtype).cpu(), linear.bias)
        else:
            rest = kept_first[:, some:]
            points.append((rest @ ordered[some:, some:] * rest).sum())
    return _interpolated(torch.tensor(widths), (torch.stack(points) * moments.weight).cpu(), count), outputs


def _interpolated(widths: Tensor, points: Tensor, count: int) -> Tensor:
    at = torch.arange(count + 1)
    right = torch.searchsorted(widths, at).clamp_min(1)
    left = right - 1
    share = (at - widths[left]) / (widths[right] - widths[left])
    return points[left] + share * (points[right] - points[left])


def _columns(units: Tensor, count: int, inputs: int) -> Tensor:
    """The columns of an output projection with `inputs` of them that belong to some of its `count` units, in order."""
    width = inputs // count
    return (units[:, None] * width + torch.arange(width)).flatten()


def _factor(system: Tensor) -> Tensor:
    """Cholesky factor. Moments in float32 can be a little indefinite: then the ridge grows until they are not."""
    factor, failed = torch.linalg.cholesky_ex(system)
    extra = system.diagonal().mean() * 1e-6
    while failed:
        system = system + extra * torch.eye(len(system), dtype=system.dtype, device=system.device)
        factor, failed = torch.linalg.cholesky_ex(system)
        extra = extra * 10
    return factor
