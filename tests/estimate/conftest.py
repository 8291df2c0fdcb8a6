"""Estimates count a text in one shard, as on a GPU. On a CPU, a step runs a shard at a time and takes less memory."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgprune_cli.forward.shards.SHARDS", 1)
