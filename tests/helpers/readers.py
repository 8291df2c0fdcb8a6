"""All that reads a model, and files of one that are others for a while."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from helpers.inputs import put, told
from pgprune_cli.data.tokens import check_vocabulary, tokens_of
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs import export as job
from pgprune_cli.jobs.doctor import doctor
from pgprune_cli.model.loading import check_prunable, load_model, load_tokenizer
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.run.decision import Decision

KEEP = tuple(LayerMask(torch.arange(4) < 4 - layer, torch.arange(24) < 9 + layer) for layer in range(4))


def read_all(model: Path, kind: str, keep: ModelMask = KEEP) -> None:
    """Everything that reads a model. What is read must work: an evaluation and the plan of an export follow."""
    text = str(model.parent / "text.txt")
    with told(f"{kind}, doctor"):
        doctor(load(find("demo"), [f"model={model}", f"calibration.corpus={text}", "evaluation.corpora=[demo]"]))
    with warnings.catch_warnings():  # which transformers gives of what it then refuses, or takes
        warnings.simplefilter("ignore")
        with told(kind):
            source = resolve(str(model))
            source.fingerprint()
            check_prunable(source)
            loaded = load_model(source, "auto", "cpu")
            evaluator = Evaluator(PrunableModel.of(loaded))
            tokens = tokens_of(text, "evaluation", load_tokenizer(source))[:16].unsqueeze(0)
            check_vocabulary(tokens, text, loaded.get_input_embeddings().num_embeddings)
            space = evaluator.shape.space(("attention", "ffn"))
            whole = evaluator.shape.keep(space, torch.ones(space.n).bool())
            evaluator.losses([whole], tokens)
        with told(f"{kind}, export"):
            source = resolve(str(model))
            Decision(keep, str(model), source.fingerprint(), 0.5, "dtype: float32\n", 1, 2, 3, 2.5).save(
                model.parent / "run"
            )
            job.plan(model.parent / "run")


class Changed:
    """A file of a model with other content inside the `with`; None for no file."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        self.path, self.content, self.before = path, content, path.read_bytes() if path.exists() else None

    def __enter__(self) -> None:
        self._put(self.content)

    def __exit__(self, *_: object) -> None:
        self._put(self.before)

    def _put(self, content: bytes | None) -> None:
        self.path.unlink(missing_ok=True)
        if content is not None:
            put(self.path, content)
