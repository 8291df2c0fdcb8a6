"""What a search finds out before its first forward pass: model files, config, tokenizer and text, each on first use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.data.bos import bos_token
from pgprune_cli.data.tokens import check_vocabulary
from pgprune_cli.data.windows import CalibrationText, calibration_text
from pgprune_cli.errors import UserError
from pgprune_cli.model.devices import devices_of, unusable_gpu
from pgprune_cli.model.families import begins_with_bos
from pgprune_cli.model.gguf_parsing import parsed_once
from pgprune_cli.model.loading import empty_prunable, load_tokenizer
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.settled import settled, with_absolute_paths


@dataclass(frozen=True)
class Preparation:
    """The recipe of a search, and what follows from it without the weights' values.

    Every property raises UserError if the search cannot have it. `search/checks.py` asks for all of them in order.

    given: the recipe as it was given; run: the run directory, None if nothing is written; found: the model's files if
    they are known to be on this machine, so that the hub is not asked.
    """

    given: Recipe
    run: Path | None = None
    progress: Progress = SILENT
    found: Source | None = None

    @cached_property
    def asked(self) -> Recipe:
        """The recipe with absolute paths. There always is one, even if this machine lacks its device."""
        return with_absolute_paths(self.given)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with absolute paths, and with the dtype of the run or of this machine."""
        return settled(self.given, self.run)

    @cached_property
    def devices(self) -> list[torch.device]:
        """The devices that the recipe names. Says if `auto` means the CPU although there is a GPU."""
        if self.asked.device == "auto" and (reason := unusable_gpu()):
            self.progress.say(f"WARN {reason}")
        return devices_of(self.asked.device)

    @cached_property
    def config_source(self) -> Source:
        """Where the model's config is. For a model on the hub nothing else is downloaded."""
        return self.found or resolve(self.asked.model, weights=False)

    @cached_property
    def source(self) -> Source:
        """Where all files of the model are, after downloading them."""
        return self.found or resolve(self.asked.model)

    def parsed_once(self) -> AbstractContextManager[None]:
        """Return a context in which a GGUF file is parsed once for its config, tokenizer and weights."""
        try:
            return parsed_once(self.config_source)
        except UserError:  # the checks say why
            return nullcontext()

    @cached_property
    def empty(self) -> PrunableModel:
        """The model without weights, on the meta device."""
        return empty_prunable(self.config_source, self.recipe.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def bos(self) -> int | None:
        """The token that every window begins with, None if windows hold only the text."""
        trained_with_bos = begins_with_bos(self.empty.config.model_type)
        return bos_token(self.recipe.calibration.bos, self.tokenizer, trained_with_bos, self.source.name)

    @cached_property
    def text(self) -> CalibrationText:
        """The calibration text, tokenized for the model."""
        settings, bos = self.recipe.calibration, self.bos
        with self.progress.working(f"reading {settings.corpus}"):
            text = calibration_text(
                settings.corpus, self.tokenizer, settings.windows, settings.heldout, settings.seqlen, bos
            )
        if self.source.gguf is None:  # a GGUF file holds its own tokenizer
            for tokens in (text.stream, text.heldout):
                check_vocabulary(tokens, settings.corpus, self.empty.config.vocab_size, bos)
        return text
