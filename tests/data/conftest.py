"""An empty working directory, a token cache of its own and the demo tokenizer, without any access to the hub."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import pgprune_cli.demo


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in an empty directory with a token cache outside of it, and fail if it reaches for the hub."""

    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("a test tried to reach the hub")

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PGPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.load_dataset", unreachable)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(pgprune_cli.demo.__file__).parent / "model")
