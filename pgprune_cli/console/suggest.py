"""Suggestions for a name that does not exist: the most similar names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from itertools import takewhile


def near(name: str, names: Iterable[str], most: int = 1) -> list[str]:
    """Return at most `most` of the names, the most similar first.

    If two names are equally similar, the one with the same beginning and end comes first, then the earlier one. Only
    the first 80 characters of `name` are compared: comparing a long text would be slow.
    """
    name, candidates = name[:80], list(dict.fromkeys(names))
    similar = set(get_close_matches(name, candidates, n=len(candidates) or 1))
    return sorted((word for word in candidates if word in similar), key=lambda word: _distance(name, word))[:most]


def _distance(name: str, candidate: str) -> tuple[float, int]:
    """Compare two names by their common letters in order, then by their ends: small-30 and model-30 share the 30."""
    ends = _common_start(name, candidate) + _common_start(reversed(name), reversed(candidate))
    return -SequenceMatcher(None, candidate, name).ratio(), -ends


def _common_start(left: Iterable[str], right: Iterable[str]) -> int:
    """Return the number of letters with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def nearest(name: str, names: Iterable[str], most: int = 1) -> str:
    """Return a question to append to an error message, or "" if no name is similar."""
    similar = near(name, names, most)
    return f", did you mean {either(similar)}?" if similar else ""


def either(names: Sequence[str]) -> str:
    """Return the names as `a, b or c`."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
