"""Our own files with damage: the loaders refuse them with a line, and verify names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.inputs import changed, damaged, examples, put, rewritten, told
from helpers.recipes import SMALL
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.export.checksums import CHECKSUMS_FILE
from pgprune_cli.jobs import export as job
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.verify import verify
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.run.checkpoint import load_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import (
    CHECKPOINTS_FOLDER,
    COSTS_FILE,
    DECISION_MASKS,
    DECISION_RECORD,
    EVALUATION_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    REPAIR_FILE,
    SCORES_FILE,
)
from pgprune_cli.run.scores import Scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a run of the demo, and of its export, by its path."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", str(folder / "cache"))
        search(load(find("demo"), [*SMALL, "repair.method=bias"]), folder / "run")
        job.export(folder / "run", folder / "out")
    (folder / "run" / COSTS_FILE).write_text(json.dumps({"attention": [3, 4], "ffn": [1, 1]}))
    (folder / "run" / EVALUATION_FILE).write_text('{"perplexity": []}')
    shutil.rmtree(folder / "cache")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in whole.items():
        put(folder / name, content)
    return folder


SAFETENSORS = [f"run/{name}" for name in (SCORES_FILE, DECISION_MASKS, REPAIR_FILE)] + [
    "run/checkpoints/*/state.safetensors"
]
OBJECTS = [f"run/{name}" for name in (DECISION_RECORD, COSTS_FILE, EVALUATION_FILE)] + ["run/checkpoints/*/state.json"]
OTHERS = [f"run/{name}" for name in (METRICS_FILE, RECIPE_FILE)] + [
    f"out/{CHECKSUMS_FILE}",
    "out/config.json",
    "out/model.safetensors",
]


def read_all(folder: Path, whole: dict[str, bytes], pattern: str, draw, strategy, kind: str) -> None:
    """Every reader on a run and an export of which one file is damaged. verify only ever lists faults."""
    path = next(folder.glob(pattern))
    original = whole[str(path.relative_to(folder))]
    content = draw(strategy(original))
    put(path, content)
    try:
        with told(f"{kind}, verify"):
            verdicts = [verify(folder / "run"), verify(folder / "out")]
            assert all(line.strip() and "\n" not in line for verdict in verdicts for line in verdict.faults)
        for read in (Scores.load, Decision.load, job.plan):
            with told(kind):
                read(folder / "run")
        with told(kind):
            load_checkpoint(next((folder / "run" / CHECKPOINTS_FOLDER).iterdir()))
    finally:
        put(path, original)


@pytest.mark.parametrize("pattern", [*SAFETENSORS, *OBJECTS, *OTHERS])
@examples(8)
@given(data=st.data())
def test_any_damage(pattern: str, folder: Path, whole, data) -> None:
    read_all(folder, whole, pattern, data.draw, damaged, "artefacts, damaged")


@pytest.mark.parametrize("pattern", SAFETENSORS)
@examples(15)
@given(data=st.data())
def test_another_header(pattern: str, folder: Path, whole, data) -> None:
    read_all(folder, whole, pattern, data.draw, rewritten, "artefacts, headers")


@pytest.mark.parametrize("pattern", [*OBJECTS, "out/config.json"])
@examples(15)
@given(data=st.data())
def test_another_value(pattern: str, folder: Path, whole, data) -> None:
    def other(content: bytes) -> st.SearchStrategy[bytes]:
        return changed(json.loads(content)).map(lambda value: json.dumps(value).encode())

    read_all(folder, whole, pattern, data.draw, other, "artefacts, values")


@pytest.mark.parametrize("pattern", [*SAFETENSORS, *OBJECTS])
@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"[" * 10**5, b"\xff" * 99, b"{}", b"null", b"[]"])
def test_no_such_thing(content: bytes, pattern: str, folder: Path, whole) -> None:
    read_all(folder, whole, pattern, lambda strategy: strategy, lambda _: content, "artefacts, nonsense")
