"""What somebody may have meant: the names nearest to one that does not exist, the nearest first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from itertools import takewhile


def near(name: str, names: Iterable[str], most: int = 1) -> list[str]:
    """At most so many of `names`, the nearest first; of two as near, the one whose ends are the same, then the first.

    Of a long name the beginning is compared: all of it would be slow, and is near to nothing.
    """
    name, others = name[:80], list(dict.fromkeys(names))
    found = set(get_close_matches(name, others, n=len(others) or 1))
    return sorted((other for other in others if other in found), key=lambda other: _distance(name, other))[:most]


def _distance(name: str, other: str) -> tuple[float, int]:
    """By what both have in common in the same order, then by their common ends: the 30 of small-30 is in model-30."""
    ends = _alike(name, other) + _alike(reversed(name), reversed(other))
    return -SequenceMatcher(None, other, name).ratio(), -ends


def _alike(one: Iterable[str], other: Iterable[str]) -> int:
    """With how many of the same letters both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def nearest(name: str, names: Iterable[str], most: int = 1) -> str:
    """The same as the end of a fault's line; "" where nothing is near."""
    found = near(name, names, most)
    return f", did you mean {either(found)}?" if found else ""


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
