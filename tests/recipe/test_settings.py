"""Settings that follow from a model's size."""

from __future__ import annotations

from typing import Any

import pytest

from pgprune_cli.recipe.settings import LARGE_MODEL, SMALL_MODEL, size_settings


def settings(parameters: int, layers: int = 32, longest: int = 2048, experts: bool = False) -> dict[str, Any]:
    return {setting.key: setting.value for setting in size_settings(parameters, layers, longest, experts=experts)}


@pytest.mark.parametrize(("layers", "fitted"), [(1, None), (4, None), (5, 2), (18, 5), (30, 8)])
@pytest.mark.parametrize("parameters", [SMALL_MODEL, LARGE_MODEL - 1])
def test_a_quarter_of_the_layers_of_a_small_model_is_fitted_to_predictions(
    parameters: int, layers: int, fitted: int | None
) -> None:
    assert settings(parameters, layers).get("repair.last_layers") == fitted


def test_a_small_model_writes_text_for_its_own_repair() -> None:
    assert settings(SMALL_MODEL)["repair.sampled_windows"] == 256
    assert "repair.sampled_windows" not in settings(SMALL_MODEL + 1)


def test_large_models_and_those_with_experts_keep_what_base_says() -> None:
    assert "repair.last_layers" not in settings(LARGE_MODEL)
    assert "repair.last_layers" not in settings(SMALL_MODEL, experts=True)


def test_windows_are_no_longer_than_the_model_reads() -> None:
    assert settings(SMALL_MODEL, longest=64)["scores.seqlen"] == 64
    assert settings(SMALL_MODEL, longest=64)["calibration.seqlen"] == 64
    assert settings(LARGE_MODEL, longest=512)["evaluation.seqlen"] == [128, 512]
    assert settings(LARGE_MODEL, longest=512)["recover.seqlen"] == 512
