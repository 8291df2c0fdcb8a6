"""Damaged files of a run or an export: the readers refuse them with one line, and verify lists them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.inputs import accepted_or_refused, altered_json, damaged, examples, with_altered_header, write
from helpers.recipes import SMALL
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.export.checksums import CHECKSUMS_FILE
from pgprune_cli.jobs import export as export_job
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
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the bytes of every file of a run of the demo and of its export, by path."""
    folder = tmp_path_factory.mktemp("intact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", str(folder / "cache"))
        search(load(find("demo"), [*SMALL, "repair.method=bias"]), folder / "run")
        export_job.export(folder / "run", folder / "out")
    (folder / "run" / COSTS_FILE).write_text(
        json.dumps({"attention": [[3, 1, 0], [4, 0, 0]], "ffn": [[1, 0, 0], [1, 0, 0]]})
    )
    (folder / "run" / EVALUATION_FILE).write_text('{"perplexity": []}')
    shutil.rmtree(folder / "cache")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(intact: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the run and the export, to damage."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in intact.items():
        write(folder / name, content)
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


def read_everything(folder: Path, intact: dict[str, bytes], pattern: str, draw, strategy, kind: str) -> None:
    """Damage one file and give the run and the export to every reader. `verify` lists faults and refuses nothing."""
    path = next(folder.glob(pattern))
    original = intact[str(path.relative_to(folder))]
    content = draw(strategy(original))
    write(path, content)
    try:
        with accepted_or_refused(f"{kind}, verify"):
            verdicts = [verify(folder / "run"), verify(folder / "out")]
            assert all(line.strip() and "\n" not in line for verdict in verdicts for line in verdict.faults)
        for read in (Scores.load, Decision.load, export_job.plan):
            with accepted_or_refused(kind):
                read(folder / "run")
        with accepted_or_refused(kind):
            load_checkpoint(next((folder / "run" / CHECKPOINTS_FOLDER).iterdir()))
    finally:
        write(path, original)


@pytest.mark.parametrize("pattern", [*SAFETENSORS, *OBJECTS, *OTHERS])
@examples(8)
@given(data=st.data())
def test_a_damaged_file_is_accepted_or_refused(pattern: str, folder: Path, intact, data) -> None:
    read_everything(folder, intact, pattern, data.draw, damaged, "artefacts, damaged")


@pytest.mark.parametrize("pattern", SAFETENSORS)
@examples(15)
@given(data=st.data())
def test_tensors_with_an_altered_header_are_accepted_or_refused(pattern: str, folder: Path, intact, data) -> None:
    read_everything(folder, intact, pattern, data.draw, with_altered_header, "artefacts, headers")


@pytest.mark.parametrize("pattern", [*OBJECTS, "out/config.json"])
@examples(15)
@given(data=st.data())
def test_json_with_another_value_is_accepted_or_refused(pattern: str, folder: Path, intact, data) -> None:
    def other(content: bytes) -> st.SearchStrategy[bytes]:
        return altered_json(json.loads(content)).map(lambda value: json.dumps(value).encode())

    read_everything(folder, intact, pattern, data.draw, other, "artefacts, values")


@pytest.mark.parametrize("pattern", [*SAFETENSORS, *OBJECTS])
@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"[" * 10**5, b"\xff" * 99, b"{}", b"null", b"[]"])
def test_a_file_of_nonsense_is_accepted_or_refused(content: bytes, pattern: str, folder: Path, intact) -> None:
    read_everything(folder, intact, pattern, lambda strategy: strategy, lambda _: content, "artefacts, nonsense")
