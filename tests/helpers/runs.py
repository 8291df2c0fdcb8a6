"""Run directories written for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.masks import keep_first
from helpers.models import save_tokenizer, tiny_model


def finished_run(run: Path) -> None:
    """Write a base model with its tokenizer into `base`, and a repaired decision about it into `run`."""
    from pgprune_cli.model.prunable import PrunableModel
    from pgprune_cli.model.source import resolve
    from pgprune_cli.repair.least_squares import repair
    from pgprune_cli.run.decision import Decision

    model = tiny_model("llama-gqa")
    model.save_pretrained("base")
    save_tokenizer(Path("base"))
    model_mask = keep_first(model, [(4 - layer, 9 + layer) for layer in range(4)])
    repaired = repair(PrunableModel.of(model), model_mask, [torch.arange(64).view(4, 16)], "least-squares", 1e-3).blocks
    Decision(model_mask, "base", resolve("base").fingerprint(), 0.5, "dtype: float32\n", 1, 2, 3, 2.5, repaired).save(
        run
    )
