"""The statistics a metric works from, and how they are collected: one pass over calibration text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.core.grid import Grid, GridCost
from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.expert_moments import ExpertMoments, gated_inputs
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.moments import Moments, block_root, dense_moments
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.families.experts import ExpertsFamily
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import Part

Statistic = Literal["input_norms", "fluctuations", "covariance", "gradients"]
"""The fields of `BlockStatistics` that need calibration text. Only the one a metric asks for is collected."""


@dataclass(frozen=True)
class BlockStatistics:
    """What a metric may look at: one block of one layer.

    grid: its elements; cost: what they cost in parameters; weights: of its projections by name, the output projection
    last; parts: what the rows of each inner projection are; seed: this block's own, for metrics that draw random
    numbers.

    Everything else is None unless the metric asks for it. For the inputs of the output projection, over all calibration
    tokens: input_norms `(in,)` float64, the L2 norm of each; fluctuations `(in,)` float64, the variance of each;
    covariance `(in, in)` float32, the mean of x xᵀ divided by the mean square of the residual stream, not centred, with
    error_root `(hidden, hidden)` float32, the weight of an output error in each direction. And gradients: by
    projection, ∂L/∂W of the mean loss in nats per token, with the shape and dtype of the weight.

    Experts count as one block whose inputs are those of all experts, times their gates: its output projection is
    `(hidden, experts · in)`. Instead of a covariance they have `experts`, the moments of each, and output_bias
    `(experts, hidden)`, if they have biases.
    """

    grid: Grid
    cost: GridCost
    weights: dict[str, Tensor]
    parts: Mapping[str, tuple[Part, ...]]
    seed: int
    input_norms: Tensor | None = None
    fluctuations: Tensor | None = None
    covariance: Tensor | None = None
    error_root: Tensor | None = None
    gradients: dict[str, Tensor] | None = None
    experts: ExpertMoments | None = None
    output_bias: Tensor | None = None

    @property
    def output_weight(self) -> Tensor:
        """Weight `(hidden, in)` of the projection that writes to the residual stream."""
        return list(self.weights.values())[-1]

    def per_element(self, columns: Tensor) -> Tensor:
        """Sum one value per input of the output projection, `(in,)`, over each element: `(elements,)` float64."""
        sums: Tensor = columns.double().unflatten(0, (self.grid.elements, -1)).sum(1)
        return sums

    def per_element_of_rows(self, projection: str, rows: Tensor) -> Tensor:
        """Sum one value per row of an inner projection, `(out,)`, over each element: `(elements,)` float64.

        The rows that a group shares count the same for each of its elements.
        """
        sums = torch.zeros(self.grid.elements, dtype=torch.float64, device=rows.device)
        parts = self.parts[projection]
        for part, values in zip(parts, rows.double().split([part.rows for part in parts]), strict=True):
            shared_by = self.grid.elements // part.runs
            sums += values.unflatten(0, (part.runs, -1)).sum(1).repeat_interleave(shared_by) / shared_by
        return sums


class Collector(Protocol):
    """Sees the inputs `(..., in)` of one projection batch by batch; `value` is called once, after the last batch."""

    def add(self, inputs: Tensor) -> None: ...

    def value(self) -> Tensor: ...


class InputNorms:
    """L2 norm of every input over all tokens: `(in,)` float64."""

    def __init__(self) -> None:
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        self.squares = self.squares + inputs.flatten(0, -2).float().square().sum(0).double()

    def value(self) -> Tensor:
        return self.squares.sqrt()


class Fluctuations:
    """Variance of every input over all tokens, divided by tokens − 1: `(in,)` float64.

    Batches are merged by their means and squared deviations (Chan et al. 1983). A sum of squares minus a squared sum
    would lose an input that varies little around a large mean.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.mean = self.deviations = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2).float()
        variance, mean = torch.var_mean(rows, 0, correction=0)
        total = self.tokens + len(rows)
        shift = mean.double() - self.mean
        deviations = variance.double() * len(rows) + shift.square() * (self.tokens * len(rows) / total)
        # Assigned together: if memory runs out above, nothing of this batch has been added.
        self.mean, self.deviations, self.tokens = (
            self.mean + shift * (len(rows) / total),
            self.deviations + deviations,
            total,
        )

    def value(self) -> Tensor:
        return self.deviations / (self.tokens - 1)


COLLECTORS: dict[str, type[Collector]] = {
    "input_norms": InputNorms,
    "fluctuations": Fluctuations,
}


def statistics(
    model: PrunableModel,
    needed: Statistic | None,
    batches: Sequence[Tensor],
    seed: int,
    only: Collection[int] | None = None,
    progress: LayerProgress = NO_PROGRESS,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[str, int, BlockStatistics]]:
    """Yield (block name, layer, its statistics) for every block of the model, layer by layer.

    needed: the statistic to collect over `batches` of tokens `(B, T)`, None for a metric that reads no text; only: if
    given, just these layers. The covariances of a layer exist until the caller drops them, so drop one block before
    asking for the next. `progress` is told about the batches that go through all layers before the first block.
    ranks: as in `dense_moments`.
    """
    family = model.family
    collector = COLLECTORS.get(needed or "")
    roots = error_roots(model, batches, progress, ranks) if needed == "covariance" else None
    by_layer = [family.blocks_of(layer) for layer in model.layers]
    moments = dense_moments(model, batches, by_layer.__getitem__, only, ranks) if roots else None
    run = start_layerwise(model, batches) if collector else None
    gradients = loss_gradients(model, batches, progress) if needed == "gradients" else None
    for index, layer in enumerate(model.layers):
        if only is not None and index not in only:
            if run and index < max(only, default=-1):
                run.advance(index)
            continue
        collectors: dict[str, Collector] = {}
        blocks = by_layer[index]
        if collector and run:
            collectors = {block.name: collector() for block in blocks}
            run.advance(index, dict(_observer(family, layer, block, collectors[block.name]) for block in blocks))
        observed = next(moments)[1] if moments else None
        root = roots[index] if roots else None
        for place, block in enumerate(blocks):
            matrices = family.matrices(layer, block)
            values: dict[str, Any] = {}
            if root is not None and observed:
                values = {"error_root": block_root(family, layer, block, root)}
                values |= _second_moments(family, layer, observed.moments(block.name))
            elif needed and collectors:
                values[needed] = collectors.pop(block.name).value()
            elif gradients is not None:
                linears = zip(block.projections, block.linears(layer), strict=True)
                values["gradients"] = {key: gradients.pop(linear) for key, linear in linears}
            yield (
                block.name,
                index,
                BlockStatistics(
                    grid=model.shape.grids[block.name][index],
                    cost=model.shape.parameters[block.name][index],
                    weights={name: weight for name, (weight, _) in matrices.items()},
                    parts={name: parts for name, (_, parts) in matrices.items()},
                    seed=block_seed(seed, index, place),
                    **values,
                ),
            )
            values.clear()  # this generator keeps none of it alive
            matrices.clear()
    for _ in moments or ():  # other processes may still need this one
        pass


def _observer(
    family: ModelFamily, layer: nn.Module, block: Block, collector: Collector
) -> tuple[tuple[str, ...], Callable[[Tensor], None]]:
    """Return whose inputs a layer-wise run has to show to collect a statistic of a block, and to what function."""
    if family.groups_per_token(layer, block) is None:
        return (block.output_path,), collector.add
    assert isinstance(family, ExpertsFamily)
    experts = family

    def add(inputs: Tensor) -> None:
        for gated in gated_inputs(experts, layer, block, inputs):
            collector.add(gated)

    return (block.module,), add


def _second_moments(family: ModelFamily, layer: nn.Module, moments: Moments | ExpertMoments) -> dict[str, Any]:
    """Return the fields of `BlockStatistics` with the second moments of a block. May overwrite its argument."""
    if isinstance(moments, Moments):
        return {"covariance": moments.second.mul_(moments.weight)}
    assert isinstance(family, ExpertsFamily)
    return {"experts": moments, "output_bias": family.output_parts(layer)[1]}


def loss_gradients(
    model: PrunableModel, batches: Sequence[Tensor], progress: LayerProgress = NO_PROGRESS
) -> dict[nn.Module, Tensor]:
    """Return ∂L/∂W of every prunable projection, where L is the mean next-token loss over `batches` of `(B, T)`.

    Apart from recovery, this is the only backward pass through the whole model, and only the metric `taylor` needs it.
    Memory on top of the weights: as much again for the gradients (13 GB for a 7B model in bfloat16; they are summed in
    the dtype of the weights), all activations of one batch, and its logits and their gradient in float32. If that runs
    out, everything starts again with smaller batches. The model is unchanged on every way out.
    """
    linears = [linear for layer in model.layers for _, _, linear in model.family.linears(layer)]
    originals = [(linear.weight.requires_grad, linear.weight.grad) for linear in linears]
    predictions = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in batches)
    if not predictions:
        raise ValueError("there is no calibration text to run")

    def accumulate(parts: Sequence[Tensor]) -> None:
        for linear in linears:
            linear.weight.requires_grad_(True).grad = None
        for done, tokens in enumerate(parts, 1):
            with torch.enable_grad():
                _summed_loss(model, tokens).backward(inputs=[linear.weight for linear in linears])
            progress.batches_done(done, len(parts))

    try:
        BatchSplitter().run_batches(batches, accumulate)
        return {linear: _gradient(linear).div_(predictions) for linear in linears}
    finally:
        for linear, (required, gradient) in zip(linears, originals, strict=True):
            linear.weight.requires_grad_(required).grad = gradient


def _gradient(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None, "a projection took no part in the loss"
    return linear.weight.grad


def _summed_loss(model: PrunableModel, tokens: Tensor) -> Tensor:
    """Return the next-token loss summed over `tokens` `(B, T)` with its graph: a float32 scalar, nats."""
    tokens = tokens.to(model.device)
    causal: Any = model.module
    logits = causal(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits.float(), tokens[:, 1:].flatten().to(logits.device), reduction="sum")


def block_seed(seed: int, layer: int, place: int) -> int:
    """Return a seed for one block: the same on every machine, and different from that of its neighbours."""
    return (seed * 1_000_003 + layer * 2 + place) % (1 << 63)
