"""Estimates count a text in one shard, as on a GPU. On a CPU, a step runs a shard at a time and takes less memory."""

from __future__ import annotations

import pytest
import torch
from helpers.attention import has_kernel_for_groups


@pytest.fixture(autouse=True)
def _one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgprune_cli.forward.shards.SHARDS", 1)


@pytest.fixture
def kernel_for_groups() -> None:
    """Skip tests that compare estimates with what torch computes or allocates, if attention is not one operator."""
    if not has_kernel_for_groups():
        pytest.skip(f"PyTorch {torch.__version__} has no kernel for attention of grouped heads on the CPU")
