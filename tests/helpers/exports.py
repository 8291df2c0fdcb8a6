"""Decisions on the tiny models, and what is exported from them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch

from helpers.masks import CHANNELS, GROUPS
from pgprune_cli.export import hf
from pgprune_cli.export.plan import Options, Plan
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

DECISIONS = {
    "some of everything": [(4, 24), (3, 7), (1, 24), (2, 1)],
    "no heads first": [(0, 9), (2, 24), (0, 24), (3, 5)],
    "no heads twice, no channels last": [(0, 5), (0, 7), (3, 0), (1, 0)],
    "layers gone, the first one too": [(0, 0), (3, 11), (0, 0), (1, 24)],
    "no heads first after a layer gone": [(0, 0), (0, 3), (2, 0), (4, 6)],
}


def draw(counts: list[tuple[int, int]]) -> tuple[LayerMask, ...]:
    """A random decision with these counts."""
    generator = torch.Generator().manual_seed(3)

    def mask(count: int, of: int) -> torch.Tensor:
        drawn = torch.zeros(of, dtype=torch.bool)
        drawn[torch.randperm(of, generator=generator)[:count]] = True
        return drawn

    return tuple(LayerMask(mask(groups, GROUPS), mask(channels, CHANNELS)) for groups, channels in counts)


def decide(base: Path, keep) -> Decision:
    return Decision(keep, str(base), resolve(str(base)).fingerprint(), 0.5, "dtype: float32", 10, 80, 9, 2.5)


def export(base: Path, out: Path, keep, measured=None, **options) -> Plan:
    return replay(decide(base, keep), out, measured, **options)


def replay(decision: Decision, out: Path, measured=None, **options) -> Plan:
    planned = hf.plan(resolve(decision.model), decision, Options(**options), measured)
    planned.write(out, lambda count: None)
    return planned


@contextmanager
def masked(model, keep):
    """The slow and obvious reference: the inputs of o_proj and down_proj zeroed, an empty block's output too."""
    handles = []
    for layer, kept in zip(model.model.layers, keep, strict=True):
        for output, mask in ((layer.self_attn.o_proj, kept.attention), (layer.mlp.down_proj, kept.ffn)):
            wide = mask.repeat_interleave(output.in_features // len(mask))
            handles.append(output.register_forward_pre_hook(lambda _, given, wide=wide: (given[0] * wide,)))
            if not mask.any():
                handles.append(output.register_forward_hook(lambda _, __, result: torch.zeros_like(result)))
    yield model
    for handle in handles:
        handle.remove()
