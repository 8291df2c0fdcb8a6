"""List the shipped recipes for people: one line per model, because its recipes differ only in the sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pgprune_cli.recipe.reader import name_of, shipped, shipped_folder, summary

PAPER = "paper/"
"""The names of recipes with the paper's settings start with this."""


@dataclass(frozen=True)
class Group:
    """The recipes for one model with the same settings.

    stem: what their names start with, such as `llama2-7b`; sparsities: what they end with, in percent, empty for a
    recipe without a sparsity in its name; text: a line about the model.
    """

    stem: str
    sparsities: tuple[str, ...]
    text: str

    @property
    def names(self) -> str:
        """The names of the recipes, with only the first in full: `llama2-7b-20, -30, -50`."""
        return ", -".join((f"{self.stem}-{self.sparsities[0]}", *self.sparsities[1:])) if self.sparsities else self.stem


def groups() -> list[Group]:
    """Return the shipped recipes by model, in the order of the numbers in their names."""
    sparsities: dict[str, list[str]] = {}
    for name in map(name_of, shipped()):
        ending = re.search(r"-(\d+)$", name)
        of_stem = sparsities.setdefault(name[: ending.start()] if ending else name, [])
        of_stem += ending.groups() if ending else ()
    return [Group(stem, tuple(sparsities[stem]), _text(stem)) for stem in sorted(sparsities, key=_natural)]


def listing() -> str:
    """Return the shipped recipes as text, those with the paper's settings last."""
    listed = groups()
    width = max(len(group.names) for group in listed)
    lines = [
        f"{group.names:<{width}}  {group.text}"
        for group in sorted(listed, key=lambda group: group.stem.startswith(PAPER))
    ]
    first_of_paper = next(row for row, line in enumerate(lines) if line.startswith(PAPER))
    lines[first_of_paper:first_of_paper] = ["", "With the paper's settings:"]
    return "\n".join(
        [
            "The number at the end of a name is the percentage of the prunable parameters that is removed.",
            "`pgprune search llama2-7b-30` runs a recipe, and `pgprune recipes show llama2-7b-30` prints it.",
            "",
            *lines,
        ]
    )


def _text(stem: str) -> str:
    """Return the first comment of the base that a model's recipes extend, or of the recipe if there is none."""
    base = shipped_folder() / f"_{Path(stem).name}.yaml"
    return summary(base if base.is_file() else shipped_folder() / f"{stem}.yaml")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts `llama2-7b` before `llama2-13b`."""
    return [(int(number or -1), text) for number, text in re.findall(r"(\d+)|(\D+)", name)]
