"""Perplexity of a model on a corpus, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.data.bos import bos_token
from pgprune_cli.data.tokens import check_vocabulary, tokens_of
from pgprune_cli.data.windows import begin_with, cut_windows, spread, text_tokens_in
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.forward.masked import summed_loss
from pgprune_cli.jobs.evaluation_request import Corpus
from pgprune_cli.jobs.targets import Target
from pgprune_cli.model.context import longest_context
from pgprune_cli.model.families import begins_with_bos
from pgprune_cli.model.loading import load_tokenizer

TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass, for any window length."""


def measure_perplexity(
    target: Target,
    corpora: Sequence[Corpus],
    seqlens: Sequence[int],
    *,
    max_windows: int | None = None,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Measure the perplexity of every corpus at every window length, as the rows that `--json` prints.

    Windows begin with BOS if `target.evaluation.bos` says so. Lengths beyond the model's longest context are lowered
    to it. max_windows: at most this many windows of the shortest length of each corpus, spread over it; other lengths
    use the same number of tokens.
    """
    if not corpora:
        return []
    tokenizer = load_tokenizer(target.source)
    context = longest_context(target.module.config) or max(seqlens)
    lengths = sorted({min(seqlen, context) for seqlen in seqlens})
    if max(seqlens) > context:
        progress.say(f"{target.name}: the model reads at most {context} tokens. Longer windows are shortened.")
    trained_with_bos = begins_with_bos(target.module.config.model_type)
    bos = bos_token(target.evaluation.bos, tokenizer, trained_with_bos, target.name)
    rows: list[dict[str, Any]] = []
    for corpus in corpora:
        with progress.working(f"perplexity of {target.name} on {corpus.name}"):
            tokens = tokens_of(corpus.text, "evaluation", tokenizer, without_bos=bos is not None)
            check_vocabulary(tokens, corpus.name, target.module.get_input_embeddings().num_embeddings, bos)
            for seqlen in lengths:
                windows = None if max_windows is None else max(1, max_windows * lengths[0] // seqlen)
                ppl, predictions = perplexity(target.module, tokens, seqlen, max_windows=windows, bos=bos)
                row = {"corpus": corpus.name, "seqlen": seqlen, "bos": bos is not None}
                rows.append(row | {"ppl": ppl, "tokens": predictions})
    return rows


def perplexity(
    model: Any, tokens: Tensor, seqlen: int, *, max_windows: int | None = None, bos: int | None = None
) -> tuple[float, int]:
    """Return exp of the mean loss over all predictions in windows of a token stream `(N,)`, and their number.

    Windows of `seqlen` tokens do not overlap, the last one may be shorter, and every prediction counts the same. With
    `max_windows`, that many windows are taken, spread over the text. With `bos`, every window begins with that token,
    so that all tokens of its text are predicted.

    Raises:
        RunError: the model's loss is not finite.
        UserError: the stream has no token to predict.
    """
    least = text_tokens_in(2, bos)
    if len(tokens) < least:
        raise UserError(f"a text of fewer than {least} tokens has no perplexity. Give a longer text.")
    device = model.get_input_embeddings().weight.device
    windows = cut_windows(tokens, seqlen, bos)
    chosen = windows if max_windows is None else spread(windows, max_windows)
    batches = list(chosen.split(max(1, TOKENS_PER_BATCH // seqlen)))
    rest = tokens[len(windows) * text_tokens_in(seqlen, bos) :]
    if len(rest) >= least and (max_windows is None or len(windows) < max_windows):
        batches.append(begin_with(bos, rest.unsqueeze(0)))
    nats = [summed_loss(model, batch.to(device)).double() for batch in batches if len(batch)]
    predictions = sum(len(batch) * (batch.shape[1] - 1) for batch in batches)
    mean = float(torch.stack(nats).sum()) / predictions
    ppl = float(torch.tensor(mean, dtype=torch.float64).exp())
    if not math.isfinite(ppl):
        raise RunError(f"the loss is not finite ({mean} nats per token). Try --dtype float32.")
    return ppl, predictions
