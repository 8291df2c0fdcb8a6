"""Search contexts around tiny models."""

from __future__ import annotations

from pathlib import Path

import torch

from pgprune_cli.console.progress import SILENT
from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.distributed import Ranks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import Source
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search.context import SearchContext


class FixedSource(Source):
    """A source without files, whose fingerprint is given by its name."""

    def fingerprint_parts(self) -> dict[str, str]:
        return {"name": self.name}


def context_of(
    recipe: Recipe, model: PrunableModel, run: Path, text: CalibrationText | None = None, fingerprint: str = "abc"
) -> SearchContext:
    """Return a context for one process; without a text, one of a single window."""
    window = torch.zeros(1, 2, dtype=torch.int64)
    text = text or CalibrationText(window, window, window.flatten())
    return SearchContext(recipe, run, FixedSource(fingerprint, Path(), None), model, text, Ranks(), SILENT)
