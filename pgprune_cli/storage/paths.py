"""Paths as people write them, and where caches are. It imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return the path with a home directory in place of `~` or `~user`; as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_directory() -> Path:
    """Return where token streams are cached: $PGPRUNE_CACHE, or else pgprune/ in the user's cache directory."""
    if own := os.environ.get("PGPRUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgprune"
