"""The elements of a block as a grid of groups × members, what they cost, and the nested chain of its widths.

The attention block is a grid of KV heads × query heads per KV head, a dense FFN one group of channels, a mixture of
experts a grid of experts × channels per expert. Kernels and formats need every kept group to have the same number of
members, so a mask over the elements is *regular*: it keeps `members` elements of each of `groups` groups.

If a block has several groups of several members, a step removes a whole group, or one member of every group (experts,
which have thousands of members, lose some at a time). The *chain* is a sequence of such steps from the whole grid to
nothing. Its steps are the units of a width search, so that every width is a regular mask. Unit 0 is removed last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SLOTS = 16
"""How many steps it takes at most to remove all channels of experts."""

ALIGNMENT = 8
"""Kernels that multiply the matrices of all experts at once need rows of 16 bytes, or of a multiple of that."""


@dataclass(frozen=True)
class Grid:
    """The elements of one block: element `g · members + m` is member m of group g.

    min_groups: how many groups a block that keeps anything has at least (a router needs as many experts as it picks);
    shared_rows: whether a group has rows of its own, which its members share (those of keys and values); separate:
    whether each group is a projection of its own (experts), so that the errors of groups add up.
    """

    groups: int
    members: int
    min_groups: int = 1
    shared_rows: bool = True
    separate: bool = False

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.groups * self.members

    @property
    def is_line(self) -> bool:
        """True if the elements can be removed in any order: every subset is regular, and they cost the same."""
        return self.members == 1 or (self.groups == 1 and not self.shared_rows)

    def slot(self, multiple: int = 1) -> int:
        """Return how many members of every group a step removes: separate groups keep a multiple of `multiple`."""
        if not self.separate:
            return 1
        multiple = math.lcm(multiple, ALIGNMENT)
        return -(-self.members // (SLOTS * multiple)) * multiple

    def kept_groups(self, mask: Tensor) -> Tensor:
        """Return the groups `(groups,)` bool of which a mask `(elements,)` keeps something."""
        return mask.view(self.groups, self.members).any(1)

    def kept(self, mask: Tensor) -> tuple[int, int]:
        """Return how many groups, and how many members of each, a regular mask `(elements,)` keeps."""
        count = int(mask.sum())
        if self.groups == 1 or self.members == 1:
            return (int(count > 0), count) if self.groups == 1 else (count, int(count > 0))
        groups = int(self.kept_groups(mask).sum())
        return groups, count // max(groups, 1)


@dataclass(frozen=True)
class GridCost:
    """What a block costs, a whole number: `element · groups · members + group · groups + member · members`."""

    element: int
    group: int = 0
    member: int = 0

    def of(self, groups: int, members: int) -> int:
        """Return the cost of `groups` groups with `members` members each. A block without elements costs nothing."""
        if not groups or not members:
            return 0
        return self.element * groups * members + self.group * groups + self.member * members

    def of_mask(self, grid: Grid, mask: Tensor) -> int:
        """Return the cost of a regular mask `(elements,)`."""
        return self.of(*grid.kept(mask))

    def of_whole(self, grid: Grid) -> int:
        """Return the cost of the whole grid."""
        return self.of(grid.groups, grid.members)


def first_elements(grid: Grid, groups: int, members: int) -> Tensor:
    """Return a regular mask `(elements,)` bool that keeps the first members of the first groups."""
    kept = torch.zeros(grid.groups, grid.members, dtype=torch.bool)
    kept[:groups, :members] = True
    return kept.flatten()


Partition = Tensor
"""The unit of every element of a block: `(elements,)` int64."""


def one_unit_per_group(grid: Grid) -> Partition:
    """Return the partition into whole groups; the elements of a group without rows of its own are units themselves."""
    return torch.arange(grid.elements) // (1 if grid.is_line else grid.members)


def unit_multiple(grid: Grid, multiple: int) -> int:
    """Return how many units of a block are `multiple` of its elements: in a grid, the chain sees to that already."""
    return multiple if grid.is_line else 1


def chain_of_removal(removed_at: Tensor) -> Partition:
    """Return the chain as a partition, from the step at which each element is removed, or any value that rises with it.

    removed_at: `(elements,)`, equal for the elements of one step.
    """
    steps, of = removed_at.unique(return_inverse=True)  # ascending
    units: Tensor = len(steps) - 1 - of
    return units


def element_order(partition: Partition, order: Tensor, grid: Grid) -> Tensor:
    """Return the elements `(elements,)` int64 of a block in the order in which its widths keep them, group after group.

    Laid out like this, every width keeps the first members of the first groups. order: the units `(units,)`, first kept
    to last; those of a chain in their own order.
    """
    place = order.argsort()[partition].view(grid.groups, grid.members)
    members = place.argsort(dim=1, stable=True) + torch.arange(grid.groups)[:, None] * grid.members
    return members[place.amin(1).argsort(stable=True)].flatten()


NO_ELEMENTS = Grid(0, 1)
"""The grid of a block that a layer lacks."""


def unit_count(partition: Partition) -> int:
    """Return the number of units of a partition."""
    return int(partition.max()) + 1 if partition.numel() else 0


def is_chain(partition: Partition, grid: Grid) -> bool:
    """Return whether the units of a partition are steps of a chain, so that only its first units may be kept."""
    return not torch.equal(partition, one_unit_per_group(grid))


def unit_costs(partition: Partition, grid: Grid, cost: GridCost) -> list[int]:
    """Return the cost of every unit.

    The cost of a chain's step is the difference that it makes behind the steps before it. If the units are elements or
    whole groups, they all cost the same, whatever else is kept.
    """
    count = unit_count(partition)
    if not is_chain(partition, grid):
        return [cost.of_whole(grid) // max(count, 1)] * count
    kept = [cost.of_mask(grid, partition < width) for width in range(count + 1)]
    return [after - before for before, after in pairwise(kept)]


Candidate = tuple[float, Tensor]
"""The error that a step adds, and the elements `(k,)` int64 that it removes."""


@dataclass
class GridRemoval:
    """The steps that empty a grid, or reduce it to `target` (groups, members): which of them are possible now."""

    grid: Grid
    cost: GridCost
    target: tuple[int, int] = (0, 0)
    multiple: int = 1

    def __post_init__(self) -> None:
        self.remaining = torch.ones(self.grid.groups, self.grid.members, dtype=torch.bool)

    @property
    def groups(self) -> Tensor:
        """The groups that remain, `(g,)` int64."""
        return self.remaining.any(1).nonzero().squeeze(1)

    @property
    def members(self) -> int:
        """How many members each remaining group has."""
        return int(self.remaining.sum()) // max(1, len(self.groups))

    @property
    def is_finished(self) -> bool:
        """True if nothing remains, or just the target."""
        return not self.remaining.any() or (len(self.groups), self.members) == self.target

    @property
    def slot(self) -> int:
        """How many members of every group the next step removes that removes no group.

        What remains is a multiple of that number in every step but the first.
        """
        size = self.grid.slot(self.multiple)
        return self.members % size or size

    def elements_of(self, group: int) -> Tensor:
        """Return the remaining elements of a group, `(m,)` int64."""
        return group * self.grid.members + self.remaining[group].nonzero().squeeze(1)

    def cheapest(self, group_errors: Callable[[], Tensor], slot: Callable[[], Candidate]) -> Candidate:
        """Return the possible step that adds the least error per cost.

        group_errors: the errors of removing each of the remaining groups, `(g,)`; slot: the best way to remove `slot`
        members of every remaining group.
        """
        steps = list(self._candidates(group_errors, slot))
        return min(steps, key=lambda step: step[0])[1]

    def _candidates(
        self, group_errors: Callable[[], Tensor], slot: Callable[[], Candidate]
    ) -> Iterator[tuple[float, Candidate]]:
        groups, members = len(self.groups), self.members
        now = self.cost.of(groups, members)
        if groups > max(self.grid.min_groups, self.target[0]):
            saved = now - self.cost.of(groups - 1, members)
            errors = group_errors()
            best = int(errors.argmin())
            error = float(errors[best])
            yield error / max(saved, 1), (error, self.elements_of(int(self.groups[best])))
        rest = members - self.slot
        if rest >= max(self.target[1], 1) or (not rest and groups == self.grid.min_groups):
            error, elements = slot()
            yield error / max(now - self.cost.of(groups, rest), 1), (error, elements)

    def remove(self, elements: Tensor) -> None:
        """Remove elements `(k,)` int64."""
        self.remaining.view(-1)[elements] = False


def chain_of_scores(
    scores: Tensor, grid: Grid, cost: GridCost, multiple: int = 1, *, cumulative: bool = False
) -> Partition:
    """Return the chain that removes the lowest score per cost in each step.

    scores: `(elements,)`, which add up; if cumulative, the errors within a group by the time each member is removed.
    """
    removal = GridRemoval(grid, cost, multiple=multiple)
    removed_at = torch.zeros(grid.elements, dtype=torch.int64)
    table, steps = scores.double().view(grid.groups, grid.members), 0
    order = table.argsort(dim=1, stable=True)
    added = table.gather(1, order)
    if cumulative:
        added = added.diff(dim=1, prepend=added.new_zeros(grid.groups, 1))

    # In every remaining group, the same number of members has been removed: the first of its order.
    def group_errors() -> Tensor:
        return added[removal.groups, grid.members - removal.members :].sum(1)

    def slot() -> Candidate:
        first = grid.members - removal.members
        of_slot = slice(first, first + removal.slot)
        members = order[removal.groups, of_slot]
        elements = removal.groups[:, None] * grid.members + members
        return float(added[removal.groups, of_slot].sum()), elements.flatten()

    while not removal.is_finished:
        _, elements = removal.cheapest(group_errors, slot)
        removed_at[elements] = steps
        removal.remove(elements)
        steps += 1
    return chain_of_removal(removed_at)
