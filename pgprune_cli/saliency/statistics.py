"""What a metric may look at, and how it is collected: forward passes over calibration text, one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgprune_cli.arch import Shape


@dataclass(frozen=True)
class BlockStatistics:
    """One block of one layer.

    units: how many it has; weights: of its projections by name, as stored, the output projection last; input_norms:
    `(in,)` float64, over all calibration tokens the L2 norm of every input of the output projection, None where no
    calibration was asked for; seed: this block's own, for metrics that draw.
    """

    units: int
    weights: dict[str, Tensor]
    input_norms: Tensor | None
    seed: int

    @property
    def output_weight(self) -> Tensor:
        """`(hidden, in)`: of the projection that writes to the residual stream."""
        return list(self.weights.values())[-1]

    def per_unit(self, columns: Tensor) -> Tensor:
        """Sums one value an input of the output projection, `(in,)`, over each unit: `(units,)` float64."""
        return columns.double().unflatten(0, (self.units, -1)).sum(1)


def input_norms(model: nn.Module, batches: Iterable[Tensor]) -> dict[nn.Module, Tensor]:
    """Per output projection, the L2 norms `(in,)` float64 of its inputs over all tokens of `batches` of `(B, T)`."""
    shape = Shape.of(model)
    sums: dict[nn.Module, Tensor] = {}
    handles = []

    def add(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].flatten(0, -2).float().square().sum(0).double()
        sums[linear] = sums[linear] + squares if linear in sums else squares

    for layer in model.get_submodule(shape.spec.layers):
        for _, block in shape.spec.blocks():
            output = layer.get_submodule(f"{block.module}.{block.output.name}")
            handles.append(output.register_forward_pre_hook(add))
    try:
        with torch.inference_mode():
            for tokens in batches:
                model.get_decoder()(input_ids=tokens.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {linear: total.sqrt() for linear, total in sums.items()}


def statistics(
    model: nn.Module, norms: dict[nn.Module, Tensor] | None, seed: int
) -> Iterator[tuple[str, int, BlockStatistics]]:
    """(block name, layer, its statistics) for every block of the model, layer by layer."""
    shape = Shape.of(model)
    for index, layer in enumerate(model.get_submodule(shape.spec.layers)):
        for place, (name, block) in enumerate(shape.spec.blocks()):
            linears = {p.name: layer.get_submodule(f"{block.module}.{p.name}") for p in block.projections}
            yield (
                name,
                index,
                BlockStatistics(
                    units=(shape.kv_groups if name == "attention" else shape.channels)[index],
                    weights={key: linear.weight for key, linear in linears.items()},
                    input_norms=None if norms is None else norms[linears[block.output.name]],
                    seed=block_seed(seed, index, place),
                ),
            )


def block_seed(seed: int, layer: int, place: int) -> int:
    """A seed for one block, the same on every machine, and different from its neighbours'."""
    return (seed * 1_000_003 + layer * 2 + place) % (1 << 63)
