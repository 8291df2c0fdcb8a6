"""One cache of tokenised text for all these tests, and the demo's recipe cut down to seconds."""

from __future__ import annotations

import pytest

from pgprune_cli.recipe import Recipe, find, load

SMALL = (
    "calibration.sequences=16",
    "calibration.seqlen=16",
    "calibration.batch=2",
    "calibration.heldout=4",
    "saliency.sequences=4",
    "saliency.seqlen=32",
    "search.steps=6",
    "search.checkpoint_every=100",
    "search.evaluate_every=3",
)


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_cache(token_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPRUNE_CACHE", token_cache)


@pytest.fixture
def small():
    """The demo's recipe, small; overrides as of `--set`."""

    def recipe(*overrides: str) -> Recipe:
        return load(find("demo"), [*SMALL, *overrides])

    return recipe
