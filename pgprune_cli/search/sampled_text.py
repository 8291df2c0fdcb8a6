"""The text that the dense model writes for the repair."""

from __future__ import annotations

from torch import Tensor

from pgprune_cli.data.tokens import first_token, ordinary_tokens
from pgprune_cli.data.windows import begin_with, text_tokens_in
from pgprune_cli.forward.sampling import sampled_batches
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.texts import empty_sampled_batches, repair_batches

NO_SAMPLED_WINDOWS = "Set repair.sampled_windows to 0."


def text_of_repair(context: SearchContext) -> list[Tensor]:
    """Return the batches `(B, T)` that the repair is fitted to: calibration text, and what the dense model writes.

    Sampled windows hold the beginning of a document each, behind BOS if windows of the calibration text begin with it.
    """
    recipe, bos, model = context.recipe, context.text.bos, context.model
    if not (empty := empty_sampled_batches(recipe)):
        return context.repair_batches
    tokenizer = load_tokenizer(context.source)
    first = first_token(tokenizer, context.source.name, NO_SAMPLED_WINDOWS) if bos is None else bos
    ordinary = ordinary_tokens(tokenizer, model.head.weight.shape[0])
    shapes = [(len(batch), text_tokens_in(batch.shape[1], bos)) for batch in empty]
    with context.progress.working("letting the dense model write text"):
        written = sampled_batches(model.module, first, ordinary, shapes, recipe.seed, context.ranks)
        sampled = [begin_with(bos, rows) for rows in written]
    return repair_batches(recipe, context.text, sampled)
