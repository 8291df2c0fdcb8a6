"""What a search optimises: the policy it updates, and the losses of the masks that the policy proposes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from pgprune_cli.core.grid import element_order
from pgprune_cli.core.policy import starting_theta
from pgprune_cli.core.space import WHOLE_FAMILIES, Budget, MaskSpace
from pgprune_cli.forward.uploads import CudaLane, Uploads
from pgprune_cli.model.devices import room_beside
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import Partitions
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import flat_scores, score_name, unit_ranks
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.objective import Objective
from pgprune_cli.search.policies import Policy, UnitPolicy, WidthPolicy
from pgprune_cli.search.table import solve_table


@dataclass
class Problem:
    """One search problem. Fixed once the model, the text and the scores are there."""

    context: SearchContext
    space: MaskSpace
    partitions: Partitions
    policy: Policy  # type: ignore[type-arg]  # of whichever state it began with
    objective: Objective

    def model_mask(self, mask: Tensor) -> ModelMask:
        """Return a mask `(n,)` over the space's units as the masks of every layer."""
        return self.context.model.shape.model_mask(self.space, mask, self.partitions)

    def kept(self, mask: Tensor) -> dict[str, list[int]]:
        """Return how many query heads, channels, blocks or layers a mask `(n,)` keeps in every layer, by family."""
        widths, layers = self.space.widths(mask), self.model_mask(mask)
        return {
            name: widths[name] if name in WHOLE_FAMILIES else [int(layer.of(name).sum()) for layer in layers]
            for name in widths
        }

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Put the model's elements into the order of the policy inside the `with`, in which its masks are evaluated."""
        self.objective.evaluate_dense()  # as the model lies after the search, where the decision is measured
        grids = self.context.model.shape.grids
        orders = {
            (index, name): element_order(self.partitions[index, name], units, grids[name][index])
            for (index, name), units in self.policy.orders.items()
        }
        evaluator = self.context.evaluator
        with evaluator.in_order(orders), evaluator.uploading(self._uploads()):
            yield

    def _uploads(self) -> Uploads | None:
        """Place the width table, if the model is on GPUs."""
        weights, layers = self.policy.projections, self.context.model.layers
        devices = {key: next(layers[key[0]].parameters()).device for key in weights}
        gpus = {device for device in devices.values() if device.type == "cuda"}
        if not gpus:
            return None
        rooms = {gpu: room_beside(gpu, self.context.step_bytes) for gpu in gpus}
        return Uploads(weights, devices, rooms, CudaLane)

    def losses(self, masks: Tensor, position: int) -> Tensor:
        """Return the objective of masks `(K, n)` on the batch at a position, repaired as the policy says: `(K,)` nats
        per token."""
        ranks = self.context.ranks
        ranks.check_same(masks, self.objective.batches.at(position))
        model_masks = [self.model_mask(masks[index]) for index in ranks.share(len(masks))]
        repaired = [self.policy.repaired(model_mask) for model_mask in model_masks]
        own_losses = self.objective.values(model_masks, position, repaired)
        return ranks.gather(own_losses, len(masks))


def set_up(context: SearchContext, space: MaskSpace, budget: Budget, partitions: Partitions, scores: Scores) -> Problem:
    """Build the problem of a search. A width search solves its table here, which takes minutes."""
    build = _unit_policy if context.recipe.search.policy == "units" else _width_policy
    policy = build(context, space, budget, partitions, scores)
    return Problem(context, space, partitions, policy, Objective(context))


def _unit_policy(
    context: SearchContext, space: MaskSpace, budget: Budget, partitions: Partitions, scores: Scores
) -> UnitPolicy:
    start, settings = context.recipe.start, context.recipe.search
    flat = flat_scores(scores.tensors, space, partitions, context.model.shape.grids, scores.metric)
    theta = starting_theta(flat, space, budget, start.mapping, start.temperature)
    return UnitPolicy(
        theta, space, budget, settings.estimator, settings.learning_rate, settings.schedule, settings.steps
    )


def _width_policy(
    context: SearchContext, space: MaskSpace, budget: Budget, partitions: Partitions, scores: Scores
) -> WidthPolicy:
    ranks_of_units: dict[tuple[int, str], Tensor] = {
        (layer, block): unit_ranks(
            scores.tensors[score_name(layer, block)],
            partitions[layer, block],
            context.model.shape.grids[block][layer],
            scores.metric,
        )
        for block in context.recipe.units.families
        for layer in range(context.model.shape.layers)
    }
    table = solve_table(context, ranks_of_units, partitions, scores.fingerprint)
    return WidthPolicy(table, table.priorities(space), space, budget)
