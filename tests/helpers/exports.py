"""Decisions on the tiny models, exports of them, and the masked dense model to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.masks import CHANNELS, KV_HEADS
from pgprune_cli.export import hf
from pgprune_cli.export.plan import Options
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

DECISIONS = {
    "mixed sizes": [(4, 24), (3, 7), (1, 24), (2, 1)],
    "no heads in the first layer": [(0, 9), (2, 24), (0, 24), (3, 5)],
    "two layers without heads, two without channels": [(0, 5), (0, 7), (3, 0), (1, 0)],
    "two layers removed, among them the first": [(0, 0), (3, 11), (0, 0), (1, 24)],
    "first layer removed, no heads in the next": [(0, 0), (0, 3), (2, 0), (4, 6)],
}
"""How many KV heads and FFN channels each layer keeps. `draw` decides which."""


def draw(counts: list[tuple[int, int]]) -> ModelMask:
    """Return a random mask that keeps the given numbers of KV heads and channels in each layer."""
    generator = torch.Generator().manual_seed(3)

    def mask(kept: int, units: int) -> torch.Tensor:
        drawn = torch.zeros(units, dtype=torch.bool)
        drawn[torch.randperm(units, generator=generator)[:kept]] = True
        return drawn

    return tuple(LayerMask(mask(kv_heads, KV_HEADS), mask(channels, CHANNELS)) for kv_heads, channels in counts)


def decide(base: Path, model_mask: ModelMask) -> Decision:
    """Return the decision that keeps these units of the model in `base`."""
    return Decision(model_mask, str(base), resolve(str(base)).fingerprint(), 0.5, "dtype: float32", 10, 80, 9, 2.5)


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


@contextmanager
def masked(model: Any, model_mask: ModelMask) -> Iterator[nn.Module]:
    """Mask a dense model in the slow and obvious way: zero the inputs of the output projections of removed units.

    A block that keeps nothing gets a zero output, so that its bias is removed too.
    """
    handles = []
    for layer, layer_mask in zip(model.model.layers, model_mask, strict=True):
        for output, mask in ((layer.self_attn.o_proj, layer_mask.attention), (layer.mlp.down_proj, layer_mask.ffn)):
            columns = mask.repeat_interleave(output.in_features // len(mask))
            handles.append(output.register_forward_pre_hook(lambda _, inputs, columns=columns: (inputs[0] * columns,)))
            if not mask.any():
                handles.append(output.register_forward_hook(lambda _, __, result: torch.zeros_like(result)))
    yield model
    for handle in handles:
        handle.remove()
