"""Second moments of the inputs of every expert's output projection, over the tokens that the router sends to it.

An expert's output is multiplied by the token's gate before it is added to the residual stream. So a token is weighted
by gate² / ‖its residual stream‖², and the errors of experts can be compared with those of heads, channels and layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.families.experts import ExpertsFamily

ROWS = 1 << 28
"""Bytes of the gated inputs of all experts that exist at the same time."""


@dataclass(frozen=True)
class ExpertMoments:
    """Weighted moments of the inputs x of each expert's output projection, float32. Sums divided by *all* tokens.

    second: of x xᵀ `(experts, in, in)`; first: of x `(experts, in)`; weight: of 1 `(experts,)`; tokens: how many each
    expert has seen, `(experts,)` int64 on the CPU.
    """

    second: Tensor
    first: Tensor
    weight: Tensor
    tokens: Tensor


class ExpertSums:
    """Sums the moments of the experts of one layer. They are the only float32 matrices, and exist for one layer."""

    def __init__(self, family: ModelFamily, layer: nn.Module, block: Block, kept: Tensor | None = None) -> None:
        assert isinstance(family, ExpertsFamily)
        self.family, self.layer, self.kept = family, layer, kept
        self.paths = (family.residual, block.module)
        self.grid = family.grid(layer, block)
        self.sums: ExpertMoments | None = None
        self.total = 0

    def add(self, residual: Tensor, inputs: Tensor) -> None:
        """Add a batch: the residual stream and the inputs of the FFN, `(B, T, hidden)` each."""
        weight = mean_square(residual).reciprocal().squeeze(1)
        sums = self.sums or self._zeros(inputs.device)
        rows = []
        for routed in self.family.routed(self.layer, inputs.flatten(0, -2), self.kept):
            scale = (routed.gates.float().square() * weight[routed.tokens]).sqrt()
            rows.append((routed.expert, routed.activations.float() * scale[:, None], scale))
        # All memory has been allocated: from here on nothing fails.
        self.sums = sums
        for expert, scaled, scale in rows:
            sums.second[expert].addmm_(scaled.T, scaled)
            sums.first[expert].addmv_(scaled.T, scale)
            sums.weight[expert] += scale.square().sum()
            sums.tokens[expert] += len(scale)
        self.total += len(weight)

    @property
    def tensors(self) -> list[Tensor]:
        """What is added up over shards."""
        sums = self.sums
        assert sums is not None
        return [sums.second, sums.first, sums.weight, sums.tokens, torch.tensor(self.total)]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Continue with what has been added up over shards."""
        *sums, total = tensors
        self.sums, self.total = ExpertMoments(*sums), int(total)

    def moments(self) -> ExpertMoments:
        """Return the moments, and drop the sums here."""
        sums, self.sums = self.sums, None
        assert sums is not None
        for part in (sums.second, sums.first, sums.weight):
            part.div_(self.total)
        return sums

    def _zeros(self, device: torch.device) -> ExpertMoments:
        experts, channels = self.grid.groups, self.grid.members
        return ExpertMoments(
            torch.zeros(experts, channels, channels, device=device),
            torch.zeros(experts, channels, device=device),
            torch.zeros(experts, device=device),
            torch.zeros(experts, dtype=torch.int64),
        )


def gated_inputs(family: ExpertsFamily, layer: nn.Module, block: Block, inputs: Tensor) -> Iterator[Tensor]:
    """Yield what the experts' output projections see as if they were one: gate · x `(rows, experts · in)` float32.

    inputs: of the FFN, `(B, T, hidden)`. Rows are zero for the experts that a token does not use.
    """
    grid = family.grid(layer, block)
    for part in inputs.flatten(0, -2).split(max(1, ROWS // (4 * grid.elements))):
        gated = torch.zeros(len(part), grid.groups, grid.members, device=part.device)
        for expert, tokens, gates, activations in family.routed(layer, part):
            gated[tokens, expert] = activations.float() * gates.float()[:, None]
        yield gated.flatten(1)


def mean_square(states: Tensor) -> Tensor:
    """Return the mean square of every token's vector in states `(B, T, hidden)`: `(B · T, 1)` float32."""
    return states.flatten(0, -2).float().square().mean(-1, keepdim=True).clamp_min(1e-12)
