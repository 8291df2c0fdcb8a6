"""Settings of recipes that are written for a model: their text, and those that follow from the model's size.

`recipes new` and the generator of the shipped recipes (`scripts/make_recipes.py`) share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pgprune_cli.recipe.strict_yaml import one_line, to_yaml

SMALL_MODEL = 500_000_000
"""Parameters up to which a search affords more text, and windows as short as its own."""

LARGE_MODEL = 2_000_000_000
"""Parameters from which training takes too much memory: weights, gradients and AdamW take 16 bytes per trained one.
The repair then fits only the last layer to the dense model's predictions, and a recovery trains adapters."""

LAST_LAYERS = 1 / 4
"""Fraction of the layers that the repair of a smaller model fits to the dense model's predictions."""

SERVER_MODEL = 6_000_000_000
"""Parameters from which a model is searched on a large GPU, which affords more forward passes and more text."""

SERVER_TIME = 10_000_000_000
"""Parameters up to which that takes about five minutes there, if the model has no experts."""


@dataclass(frozen=True)
class Setting:
    """A recipe key with its value, and a comment that says why ("" for none)."""

    key: str
    value: Any
    comment: str = ""


def size_settings(parameters: int, layers: int, longest: int, *, experts: bool) -> list[Setting]:
    """Return window lengths that a model can read, and how much text and time suit a model of this size.

    parameters, layers: of the whole model; longest: the most tokens that it reads at once; experts: whether it has any.
    Empty if the values of `_base` fit.
    """
    settings = []
    if longest < 128:
        settings.append(Setting("calibration.seqlen", longest, "the model reads no more tokens at once"))
    if parameters <= SMALL_MODEL:
        settings += [
            Setting("scores.windows", 384),
            Setting("scores.seqlen", min(128, longest), "the same length as the windows of the search"),
            Setting("search.forward_passes", 256),
            Setting("repair.epochs", 2, "fewer readings of more text"),
            Setting("repair.windows", 512, "a small model affords more text"),
            Setting("repair.sampled_windows", 256, "they preserve what the calibration text does not show"),
        ]
    elif longest < 1024:
        settings.append(Setting("scores.seqlen", longest, "the model reads no more tokens at once"))
    last_layers = math.ceil(LAST_LAYERS * layers)
    if parameters < LARGE_MODEL and not experts and last_layers > 1:
        settings.append(
            Setting("repair.last_layers", last_layers, "a quarter of the layers, for which memory suffices")
        )
    if parameters >= SERVER_MODEL:
        settings += server_settings(parameters, experts=experts)
    settings += recovery_settings(parameters, longest)
    if longest < 2048:
        lengths = sorted({min(128, longest), longest})
        settings.append(Setting("evaluation.seqlen", lengths, "the model reads no more tokens at once"))
    return settings


def server_settings(parameters: int, *, experts: bool) -> list[Setting]:
    """Return as many forward passes and as much text of the repair as a large GPU affords (docs/performance.md)."""
    minutes = "5 minutes" if parameters < SERVER_TIME else "9 minutes at 13B"
    time = "for large GPUs" if experts else f"by estimate {minutes} on an H100"
    return [
        Setting("search.forward_passes", 5120, f"{time}; 320 passes take far less time and suit a CPU"),
        Setting("repair.windows", 1536, "wide projections need more text; 384 take far less time"),
    ]


def recovery_settings(parameters: int, longest: int) -> list[Setting]:
    """Return how a recovery trains a large model, and window lengths that a model can read. Parameters as above."""
    if parameters < LARGE_MODEL:
        too_short = Setting("recover.seqlen", longest, "the model reads no more tokens at once")
        return [too_short] if longest < 128 else []
    return [
        Setting("recover.seqlen", min(1024, longest)),
        Setting("recover.batch", 1),
        Setting("recover.accumulate", 16),
        Setting("recover.train", "lora", "all weights would take 16 bytes of memory per parameter"),
        Setting("recover.teacher", "cached", "so the dense model needs no memory beside the one that is trained"),
        Setting("recover.top_k", 64),
        Setting("recover.gradient_checkpointing", True),
    ]


def yaml_lines(settings: Iterable[Setting]) -> list[str]:
    """Return the settings as lines of YAML. Keys of one section must be next to each other."""
    lines, section = [], ""
    for setting in settings:
        name, _, key = setting.key.rpartition(".")
        if name != section and name:
            lines.append(f"{name}:")
        section = name
        comment = f"  # {one_line(setting.comment)}" if setting.comment else ""
        lines.append(f"{'  ' if name else ''}{key}: {to_yaml(setting.value)}{comment}")
    return lines
