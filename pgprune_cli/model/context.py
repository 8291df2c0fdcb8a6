"""The longest context of a model: how many tokens it reads at once. This is the only place that decides it.

Losses beyond the longest context mean nothing: the model has never seen such positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pgprune_cli.errors import UserError

SCALED_FROM_ORIGINAL = ("yarn", "llama3", "longrope", "dynamic")
"""The kinds of RoPE that stretch `original_max_position_embeddings` by their factor. For `linear`, configs differ in
whether `max_position_embeddings` is the length before or after stretching, so what they say is taken."""


def longest_context(config: Any) -> int | None:
    """Return the most tokens that a model reads at once, None if its config does not say.

    That is `max_position_embeddings`, or what its RoPE is scaled to if that is more: Qwen2.5 with YaRN keeps the
    length before scaling in `max_position_embeddings`. A sliding window limits what a token sees, and no positions.
    """
    longest = _length(getattr(config, "max_position_embeddings", None))
    if longest is None:
        return None
    return max([longest, *(int(length) for length in _scaled_lengths(config, longest))])


def refuse_longer_windows(config: Any, name: str, lengths: Mapping[str, int]) -> None:
    """Raise UserError if a window is longer than the model's longest context.

    name: the model; lengths: tokens per window, by the recipe key or option that sets them.
    """
    longest = longest_context(config)
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise UserError(
                f"{key}: windows of {length} tokens are longer than the context of {name}, which is {longest} tokens. "
                f"Set {key} to {longest} or less."
            )


def _scaled_lengths(config: Any, longest: int) -> Iterator[float]:
    """Yield the lengths that the RoPE of each kind of layer is scaled to."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return
    for rope in (parameters, *parameters.values()):  # some models have parameters for every kind of layer
        if not isinstance(rope, Mapping) or rope.get("rope_type") not in SCALED_FROM_ORIGINAL:
            continue
        original = _length(rope.get("original_max_position_embeddings")) or longest
        factor = rope.get("factor")
        if isinstance(factor, int | float) and 1 <= factor < 2**20:
            yield original * factor


def _length(value: Any) -> int | None:
    """Return a number of tokens as it is, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
