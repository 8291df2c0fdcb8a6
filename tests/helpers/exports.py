"""Decisions on the tiny models, and exports of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helpers.masks import Count
from pgprune_cli.export import hf
from pgprune_cli.export.plan import Options
from pgprune_cli.model.loading import eager_if_capped
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

DECISIONS: dict[str, list[tuple[Count, Count]]] = {
    "mixed sizes": [(4, 24), ((3, 1), 7), (1, 24), (2, 1)],
    "fewer query heads in every layer": [((4, 1), 24), ((2, 1), 24), ((1, 1), 11), ((3, 1), 24)],
    "no heads in the first layer": [(0, 9), (2, 24), (0, 24), ((3, 1), 5)],
    "two layers without heads, two without channels": [(0, 5), (0, 7), (3, 0), ((1, 1), 0)],
    "two layers removed, among them the first": [(0, 0), (3, 11), (0, 0), (1, 24)],
    "first layer removed, no heads in the next": [(0, 0), (0, 3), ((2, 1), 0), (4, 6)],
}
"""What each layer keeps: KV heads, or (KV heads, query heads of each), and FFN channels. `draw` decides which."""


def load_export(directory: Path) -> Any:
    """Load a model as its users do, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    eager = eager_if_capped(AutoConfig.from_pretrained(directory))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **eager).eval()


def decide(base: Path, model_mask: ModelMask) -> Decision:
    """Return the decision that keeps these units of the model in `base`."""
    source = resolve(str(base))
    return Decision(
        model_mask,
        str(base),
        source.fingerprint(),
        0.5,
        "dtype: float32",
        10,
        80,
        9,
        2.5,
        base=source.fingerprint_parts(),
    )


def export(
    base: Path, out: Path, model_mask: ModelMask, measured: Mapping[str, Any] | None = None, **options: Any
) -> hf.DirectoryPlan:
    """Write the model in `base`, pruned to a mask, as a transformers directory."""
    return replay(decide(base, model_mask), out, measured, **options)


def replay(
    decision: Decision, out: Path, measured: Mapping[str, Any] | None = None, **options: Any
) -> hf.DirectoryPlan:
    """Write the export of a decision as a transformers directory."""
    plan = hf.plan(resolve(decision.model), decision, Options(**options), measured)
    plan.write(out, lambda _: None)
    return plan
