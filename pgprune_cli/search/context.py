"""The context of one search, passed down as one value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pgprune_cli.console.progress import Progress
from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.distributed import Ranks
from pgprune_cli.forward.curvature import ErrorRoots, error_roots
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.fingerprint import digest
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import Source
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search.texts import repair_batches


@dataclass(frozen=True)
class SearchContext:
    """What every phase of a search works with.

    recipe: resolved; run: the run directory; source: the model's files; model: loaded; text: what the search reads, cut
    into windows; ranks: this process among those of the search; progress: where it reports; shared_widths: the
    directory of a width table that several searches share, None for one in the run directory; step_bytes: what a
    forward pass of a step takes on a device beside the weights, as estimated.
    """

    recipe: Recipe
    run: Path
    source: Source
    model: PrunableModel
    text: CalibrationText
    ranks: Ranks
    progress: Progress
    shared_widths: Path | None = None
    step_bytes: int = 0

    @cached_property
    def fingerprint_parts(self) -> dict[str, str]:
        """The parts of the fingerprint of the model's config, tokenizer and weights."""
        return self.source.fingerprint_parts()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model's config, tokenizer and weights."""
        return digest(self.fingerprint_parts)

    @cached_property
    def repair_batches(self) -> list[Tensor]:
        """The batches that the width table is fitted to, and the repair unless it reads sampled ones too."""
        return repair_batches(self.recipe, self.text)

    @cached_property
    def error_roots(self) -> ErrorRoots:
        """What errors cost on these batches, for the width table and the repair."""
        return error_roots(self.model, self.repair_batches, ranks=self.ranks)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Computes losses of the model under masks."""
        return Evaluator(self.model)
