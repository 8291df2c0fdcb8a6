"""What a metric may look at, and how it is collected: one pass over calibration text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.layerwise import layer_inputs
from pgprune_cli.forward.moments import MomentCollector
from pgprune_cli.model.prunable import Shape, projections

Statistic = Literal["input_norms", "fluctuations", "covariance", "gradients"]
"""The fields of `BlockStatistics` that need calibration text. Only the one a metric asks for is collected."""


@dataclass(frozen=True)
class BlockStatistics:
    """One block of one layer.

    units: how many it has; weights: of its projections by name, as they are multiplied with, the output projection
    last; seed: this block's own, for metrics that draw. The rest is None unless asked for. Over all calibration tokens,
    of the inputs of the output projection: input_norms `(in,)` float64, the L2 norm of each; fluctuations `(in,)`
    float64, the variance of each; covariance `(in, in)` float64, mean of x xᵀ / mean square of the residual stream, not
    centred; with error_root `(hidden, hidden)` float64, through which an output error goes. And gradients: by
    projection, ∂L/∂W of the mean loss in nats per token, shape and dtype of the weight.
    """

    units: int
    weights: dict[str, Tensor]
    seed: int
    input_norms: Tensor | None = None
    fluctuations: Tensor | None = None
    covariance: Tensor | None = None
    error_root: Tensor | None = None
    gradients: dict[str, Tensor] | None = None

    @property
    def output_weight(self) -> Tensor:
        """`(hidden, in)`: of the projection that writes to the residual stream."""
        return list(self.weights.values())[-1]

    def per_unit(self, columns: Tensor) -> Tensor:
        """Sums one value an input of the output projection, `(in,)`, over each unit: `(units,)` float64."""
        return columns.double().unflatten(0, (self.units, -1)).sum(1)


class Collector(Protocol):
    """Sees the inputs `(..., in)` of one projection batch by batch; `value` is asked for once, after the last."""

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
    """Variance of every input over all tokens, divided by tokens − 1: `(in,)` float64; `mean` is theirs.

    Batches are merged by their means and squared deviations (Chan et al. 1983): a sum of squares minus a squared sum
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
        # All at once: memory may run out before, and nothing is added then.
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
    model: nn.Module,
    needed: Statistic | None,
    batches: Sequence[Tensor],
    seed: int,
    only: Collection[int] | None = None,
    on_batches: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, int, BlockStatistics]]:
    """(block name, layer, its statistics) for every block of the model, layer by layer; `only` of these layers.

    `batches` of tokens `(B, T)` are read only for a `needed` statistic. A layer's covariances exist from its turn on
    until the reader lets go of them, so let go of one block before asking for the next. `on_batches(done, of)` is told
    of those that go through all layers before the first block comes.
    """
    shape = Shape.of(model)
    collector = COLLECTORS.get(needed or "")
    roots = error_roots(model, batches, on_batches) if needed == "covariance" else None
    stream = layer_inputs(model, batches) if collector or roots else None
    gradients = loss_gradients(model, batches, on_batches) if needed == "gradients" else None
    for index, layer in enumerate(model.get_submodule(shape.spec.layers)):
        if only is not None and index not in only:
            if stream and index < max(only, default=-1):
                stream.advance(index)
            continue
        collectors: dict[str, Collector] = {}
        moments = MomentCollector(shape, [name for name, _ in shape.spec.blocks()])
        if roots and stream:
            stream.advance(index, moments.watch)
        elif collector and stream:
            collectors = {name: collector() for name, _ in shape.spec.blocks()}
            paths = {name: block.output_path for name, block in shape.spec.blocks()}
            stream.advance(index, {(paths[name],): one.add for name, one in collectors.items()})
        for place, (name, block) in enumerate(shape.spec.blocks()):
            linears = {p.name: layer.get_submodule(f"{block.module}.{p.name}") for p in block.projections}
            found: dict[str, Any] = {}
            if roots:
                of_block = moments.moments(name)
                found = {"covariance": of_block.second.mul_(of_block.weight), "error_root": roots[index]}
                del of_block
            elif needed and collectors:
                found[needed] = collectors.pop(name).value()
            elif gradients is not None:
                found["gradients"] = {key: gradients.pop(linear) for key, linear in linears.items()}
            yield (
                name,
                index,
                BlockStatistics(
                    units=(shape.kv_heads if name == "attention" else shape.channels)[index],
                    weights={key: linear.weight for key, linear in linears.items()},
                    seed=block_seed(seed, index, place),
                    **found,
                ),
            )
            found.clear()  # this generator keeps none of it alive


def loss_gradients(
    model: nn.Module, batches: Sequence[Tensor], on_batches: Callable[[int, int], None] | None = None
) -> dict[nn.Module, Tensor]:
    """∂L/∂W of every prunable projection, L the mean next-token loss over all predictions in `batches` of `(B, T)`.

    The only backward pass of pgprune, and only for the metric `taylor`. Memory on top of the weights: as much again for
    the gradients (13 GB for a 7B model in bfloat16; they are summed in the weights' dtype), every activation of one
    batch, and its logits and their gradient in float32; where that runs out, all begins again with smaller batches. The
    model is left as it was, on every way out. `on_batches(done, of)` is told how many have gone through it.
    """
    spec = Shape.of(model).spec
    linears = [linear for layer in model.get_submodule(spec.layers) for _, _, linear in projections(spec, layer)]
    before = [(linear.weight.requires_grad, linear.weight.grad) for linear in linears]
    predictions = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in batches)
    if not predictions:
        raise ValueError("there is no calibration text to run")

    def add_up(parts: Sequence[Tensor]) -> None:
        for linear in linears:
            linear.weight.requires_grad_(True).grad = None
        for done, tokens in enumerate(parts, 1):
            with torch.enable_grad():
                _summed_loss(model, tokens).backward(inputs=[linear.weight for linear in linears])
            if on_batches is not None:
                on_batches(done, len(parts))

    try:
        BatchSplitter().all(batches, add_up)
        return {linear: linear.weight.grad.div_(predictions) for linear in linears}
    finally:
        for linear, (required, gradient) in zip(linears, before, strict=True):
            linear.weight.requires_grad_(required).grad = gradient


def _summed_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss summed over all predictions in `tokens` `(B, T)`, with its graph: a float32 scalar, nats."""
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits.float(), tokens[:, 1:].flatten().to(logits.device), reduction="sum")


def block_seed(seed: int, layer: int, place: int) -> int:
    """A seed for one block, the same on every machine, and different from its neighbours'."""
    return (seed * 1_000_003 + layer * 2 + place) % (1 << 63)
