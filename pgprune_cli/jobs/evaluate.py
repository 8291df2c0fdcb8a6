"""eval: perplexity and speed of a dense model, an exported one or a run directory; jobs/tasks.py has the accuracies."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.data.corpora import check_corpus
from pgprune_cli.data.tokens import check_vocabulary, tokens_of
from pgprune_cli.data.windows import spread
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.model.loading import load_model, load_tokenizer
from pgprune_cli.model.masks import ModelMask, Outputs
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recipe.reader import UnknownKeys, load, parse
from pgprune_cli.recipe.schema import Evaluation, name_and_text
from pgprune_cli.run.decision import Decision, read_origin
from pgprune_cli.run.layout import DECISION_RECORD, EVALUATION_FILE, RECIPE_FILE, is_run
from pgprune_cli.run.provenance import note
from pgprune_cli.storage.records import read_record, write_record

TOKENS_AT_A_TIME = 4096
"""Tokens of one forward pass, whatever the window length."""

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 512, 64, 5


@dataclass(frozen=True)
class Corpus:
    """A corpus of `--ppl` or of a recipe: the name it is reported under, and where its text lies: a name or a file."""

    name: str
    text: str

    @classmethod
    def parse(cls, option: str) -> Corpus:
        """`wikitext2`, or `NAME=FILE`. Raises UserError."""
        name, text = name_and_text(option)
        if not (name and text):
            raise UserError(f"--ppl {option}: expected a corpus name or NAME=FILE")
        return cls(name, text)

    @classmethod
    def of(cls, evaluation: Evaluation) -> list[Corpus]:
        """Those that a recipe names. Raises UserError where one is neither a file here nor the name of a corpus."""
        corpora = [cls(*name_and_text(corpus)) for corpus in evaluation.corpora]
        for corpus in corpora:
            check_corpus(corpus.text)
        return corpora


@dataclass
class Target:
    """A model under evaluation; for a run directory, the base model and what is kept of it."""

    name: str
    source: Source
    model: nn.Module
    keep: ModelMask | None
    outputs: Outputs
    evaluation: Evaluation
    """What the recipe says to evaluate, of a run directory or of a model exported from one; else the defaults."""
    base: str | None
    """The model that this one was pruned from, by its name in the decision; None for a dense one."""

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """The model as it is to be judged: shrunk inside the `with` for a run directory."""
        if self.keep is None:
            yield self.model
        else:
            with Evaluator(PrunableModel.of(self.model)).shrunk(self.keep, self.outputs) as model:
                yield model

    def parameters(self) -> int:
        """How many are left, tied ones counted once."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        if self.keep is not None:
            for block, parameters in PrunableModel.of(self.model).shape.parameters.items():
                for layer, count in zip(self.keep, parameters, strict=True):
                    total -= int((~layer.of(block)).sum()) * count
        return total


def open_target(
    name: str, dtype: str | None, device: str | None, progress: Progress = SILENT, as_recipe: bool = False
) -> Target:
    """Loads what `pgprune eval` was given. `dtype` and `device` default to the recipe's for a run, else to auto.

    `as_recipe`: it will be evaluated on what its recipe says, which is looked for before anything is loaded. Raises
    UserError for what is damaged or not there.
    """
    run = Path(name)
    keep: ModelMask | None = None
    outputs: Outputs = {}
    base: str | None
    if is_run(run):
        decision = Decision.load(run)
        recipe = load(run / RECIPE_FILE)
        keep, outputs = decision.model_mask, decision.outputs
        source = resolve(recipe.model)
        if source.fingerprint() != decision.fingerprint:
            raise UserError(f"{name}: {recipe.model} is not the model that was searched; its files have changed")
        dtype, device = dtype or recipe.dtype, device or recipe.device
        evaluation, base = recipe.evaluation, source.name
    else:
        source = resolve(name)
        evaluation, base = _of_export(source, progress)
    if as_recipe:
        Corpus.of(evaluation)
    with progress.working(f"loading {name}"):
        model = load_model(source, dtype or "auto", device or "auto")
    return Target(name, source, model, keep, outputs, evaluation, base)


def _of_export(source: Source, progress: Progress) -> tuple[Evaluation, str | None]:
    """What the decision beside a model says to evaluate, and what it was pruned from; the defaults of a dense model."""
    origin = read_origin(source.directory)
    if origin is None:
        return Evaluation(), None
    try:
        return parse(origin.recipe, f"{source.directory / DECISION_RECORD}: its recipe").evaluation, origin.model
    except UnknownKeys:
        said = "its recipe is of another pgprune, and what it says to evaluate is not known: the defaults are taken"
        progress.say(f"{source.directory / DECISION_RECORD}: {said}")
        return Evaluation(), origin.model


def evaluate(
    target: Target, corpora: Sequence[Corpus], seqlens: Sequence[int], limit: int | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Perplexities of every corpus at every window length, as the object that `--json` prints.

    A length above the model's limit is lowered to it. `limit`: at most so many windows of the shortest length of each
    corpus, spread over it, and as many tokens at every other length.
    """
    tokenizer = load_tokenizer(target.source)
    longest = getattr(target.model.config, "max_position_embeddings", None) or max(seqlens)
    lengths = sorted({min(seqlen, longest) for seqlen in seqlens})
    if max(seqlens) > longest and corpora:
        progress.say(f"{target.name} reads {longest} tokens at most, and no window is longer")
    rows = []
    for corpus in corpora:
        with progress.working(f"perplexity of {target.name} on {corpus.name}"):
            tokens = tokens_of(corpus.text, "evaluation", tokenizer)
            check_vocabulary(tokens, corpus.name, _embedding(target.model).num_embeddings)
            for seqlen in lengths:
                windows = None if limit is None else max(1, limit * lengths[0] // seqlen)
                with target.ready() as model:
                    ppl, predicted = perplexity(model, tokens, seqlen, windows)
                rows.append({"corpus": corpus.name, "seqlen": seqlen, "ppl": ppl, "tokens": predicted})
    return {
        "model": target.name,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "device": str(_embedding(target.model).weight.device),
        "parameters": target.parameters(),
        "perplexity": rows,
    }


def perplexity(model: nn.Module, tokens: Tensor, seqlen: int, limit: int | None = None) -> tuple[float, int]:
    """exp of the mean loss over every prediction in windows of `seqlen` of the stream `(N,)`, and their number.

    Windows do not overlap, the last one may be shorter, and every prediction counts the same. With a `limit`, so many
    windows are taken, spread over the text. Raises RunError where the model's loss is not finite, UserError for a
    stream of fewer than 2 tokens.
    """
    if len(tokens) < 2:
        raise UserError("a text of fewer than 2 tokens has no perplexity")
    device = _embedding(model).weight.device
    whole = tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
    chosen = whole if limit is None else spread(whole, limit)
    batches = list(chosen.split(max(1, TOKENS_AT_A_TIME // seqlen)))
    rest = tokens[len(whole) * seqlen :]
    if len(rest) > 1 and (limit is None or len(whole) < limit):
        batches.append(rest.unsqueeze(0))
    nats = [summed_loss(model, batch.to(device)).double() for batch in batches if len(batch)]
    predicted = sum(len(batch) * (batch.shape[1] - 1) for batch in batches)
    mean = float(torch.stack(nats).sum()) / predicted
    ppl = float(torch.tensor(mean, dtype=torch.float64).exp())
    if not math.isfinite(ppl):
        raise RunError(f"the loss is not finite ({mean} nats per token); try --dtype float32")
    return ppl, predicted


def measure_speed(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Tokens per second, prefill and decode, of models measured in turn in one run: medians of REPEATS.

    Prefill is a prompt of PROMPT_TOKENS and one new token, decode is NEW_TOKENS more with the cache; greedy, batch 1.
    Also the bytes of the weights, and on CUDA the peak of allocated memory. Raises ValueError for a run (the verb
    refuses one before it is loaded): its model is shrunk anew in every forward, which says nothing about the exported.
    """
    if any(target.keep is not None for target in targets):
        raise ValueError("speed is measured on an exported model, not on a run")
    prefill: list[list[float]] = [[] for _ in targets]
    decode: list[list[float]] = [[] for _ in targets]
    peaks = [0] * len(targets)
    for repeat in range(REPEATS + 1):
        for index, target in enumerate(targets):
            seconds_prefill, seconds_decode, peaks[index] = _time_once(target.model)
            if repeat:  # the first is a warm-up
                prefill[index].append(seconds_prefill)
                decode[index].append(seconds_decode)
    results = []
    for index, target in enumerate(targets):
        prompt = _prompt(target.model).shape[1]
        weights = sum(p.numel() * p.element_size() for p in target.model.parameters())
        results.append(
            {
                "prefill_tokens_per_second": prompt / statistics.median(prefill[index]),
                "decode_tokens_per_second": NEW_TOKENS / statistics.median(decode[index]),
                "weight_bytes": weights,
                "peak_memory_bytes": peaks[index] or None,
            }
        )
    return results


def _embedding(model: nn.Module) -> nn.Embedding:
    """Return the input embedding of a transformers model."""
    causal: Any = model
    embedding: nn.Embedding = causal.get_input_embeddings()
    return embedding


def _prompt(model: nn.Module) -> Tensor:
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None) or PROMPT_TOKENS
    length = min(PROMPT_TOKENS, longest // 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
    return tokens.to(_embedding(model).weight.device)


def _time_once(model: nn.Module) -> tuple[float, float, int]:
    """Seconds of one prefill and of one decode, and the peak of CUDA memory in bytes (0 elsewhere)."""
    prompt = _prompt(model)
    cuda = prompt.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(prompt.device)
    prefill = _seconds_to_generate(model, prompt, 1)
    both = _seconds_to_generate(model, prompt, 1 + NEW_TOKENS)
    return prefill, both - prefill, torch.cuda.max_memory_allocated(prompt.device) if cuda else 0


def _seconds_to_generate(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    causal: Any = model
    began = time.perf_counter()
    result = causal.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=tokens,  # no end of text before its time
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,  # never needed, but asked for
    )
    result[0, -1].item()  # waits for the device
    return time.perf_counter() - began


def remember(target: Target, result: dict[str, Any]) -> None:
    """Keeps the result of a run directory in it, for the model card that export writes.

    What another call measured in the same dtype on the same device, and this one did not measure, stays.
    """
    if target.keep is None:
        return
    path = Path(target.name) / EVALUATION_FILE
    before = read_record(path) if path.exists() else {}
    if all(before.get(key) == result[key] for key in ("parameters", "dtype", "device")):
        result = result | {
            key: before[key] for key in ("perplexity", "tasks") if before.get(key) and not result.get(key)
        }
    write_record(path, result)
    note(path.parent)
