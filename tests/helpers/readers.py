"""Gives a model, damaged or not, to everything that reads models."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from helpers.inputs import accepted_or_refused, write
from helpers.masks import dense_mask
from pgprune_cli.core.grid import Grid, first_elements
from pgprune_cli.data.tokens import check_vocabulary, tokens_of
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs import export as export_job
from pgprune_cli.jobs.doctor import doctor
from pgprune_cli.model.loading import check_prunable, load_prunable, load_tokenizer
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.run.decision import Decision

MODEL_MASK = tuple(
    LayerMask(first_elements(Grid(4, 2), 4 - layer, 2), torch.arange(24) < 9 + layer) for layer in range(4)
)


def read_everything(path: Path, kind: str, model_mask: ModelMask = MODEL_MASK) -> None:
    """Give the model to doctor, to an evaluation and to the plan of an export: each accepts it or refuses it clearly.

    A `text.txt` must lie beside the model.
    """
    text = str(path.parent / "text.txt")
    with accepted_or_refused(f"{kind}, doctor"):
        doctor(load(find("demo"), [f"model={path}", f"calibration.corpus={text}", "evaluation.corpora=[demo]"]))
    with warnings.catch_warnings():  # transformers warns about models that it refuses or accepts later
        warnings.simplefilter("ignore")
        with accepted_or_refused(kind):
            source = resolve(str(path))
            source.fingerprint()
            check_prunable(source)
            model = load_prunable(source, "auto", "cpu")
            tokens = tokens_of(text, "evaluation", load_tokenizer(source))[:16].unsqueeze(0)
            check_vocabulary(tokens, text, model.embedding.num_embeddings)
            Evaluator(model).losses([dense_mask(model.module)], tokens)
        with accepted_or_refused(f"{kind}, export"):
            source, run = resolve(str(path)), path.parent / "run"
            Decision(model_mask, str(path), source.fingerprint(), 0.5, "dtype: float32\n", 1, 2, 3, 2.5).save(run)
            export_job.plan(run)


class Changed:
    """Inside the `with`, a file has other content; None removes it."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        self.path, self.content, self.original = path, content, path.read_bytes() if path.exists() else None

    def __enter__(self) -> None:
        self._replace(self.content)

    def __exit__(self, *_: object) -> None:
        self._replace(self.original)

    def _replace(self, content: bytes | None) -> None:
        self.path.unlink(missing_ok=True)
        if content is not None:
            write(self.path, content)
