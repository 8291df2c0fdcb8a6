"""The check that nothing waits for a GPU, which needs no GPU itself."""

import warnings

import pytest
import torch
from helpers.gpu import waiting_is_an_error


def test_the_warning_about_the_debug_mode_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def set_mode(mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with waiting_is_an_error():
        assert modes == ["error"]
    assert modes == ["error", "default"]
