"""runs: the states of run directories that are made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.messages import refused, says
from helpers.recoveries import write_run

from pgprune_cli.jobs.runs import cells, runs_in
from pgprune_cli.recipe.reader import dump, find, load
from pgprune_cli.run.layout import (
    DECISION_MASKS,
    DECISION_RECORD,
    METRICS_FILE,
    RECIPE_FILE,
    SCORES_FILE,
    TRAINING_HISTORY,
    TRAINING_RECORD,
)
from pgprune_cli.storage.records import write_json, write_record

RECIPE = dump(load(find("demo")))


DECIDED = {"sparsity": 0.49, "heldout_loss": None, "bos": False, "best_step": 5}


def write_unfinished_run(run: Path, steps: int) -> None:
    """Write a recipe and a history of `steps` steps with an incomplete last line."""
    run.mkdir(parents=True)
    (run / RECIPE_FILE).write_text(RECIPE)
    (run / METRICS_FILE).write_text("".join(json.dumps({"step": step + 1}) + "\n" for step in range(steps)) + '{"st')


def test_runs_in_tells_the_states_apart_and_skips_exported_models(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / SCORES_FILE).touch()
    write_unfinished_run(tmp_path / "b" / "deep", 7)
    write_unfinished_run(tmp_path / "c", 20)
    (tmp_path / "c" / DECISION_MASKS).touch()
    write_record(tmp_path / "c" / DECISION_RECORD, DECIDED)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / RECIPE_FILE).write_text("model: [")
    (tmp_path / "e").mkdir()  # an exported model
    (tmp_path / "e" / "config.json").touch()
    (tmp_path / "e" / DECISION_RECORD).touch()
    (tmp_path / ".f.tmp").mkdir()
    (tmp_path / ".f.tmp" / SCORES_FILE).touch()
    rows = {Path(row["run"]).relative_to(tmp_path).as_posix(): row for row in runs_in(tmp_path)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "scored",
        "b/deep": "searching",
        "c": "finished",
        "d": "damaged",
    }
    assert (rows["b/deep"]["step"], rows["b/deep"]["steps"]) == (7, 20)
    assert (rows["c"]["sparsity"], rows["c"]["target"], rows["c"]["heldout_loss"]) == (0.49, 0.5, None)
    assert rows["d"]["fault"].startswith(f"{tmp_path / 'd' / RECIPE_FILE}:1: ")
    assert [line[1] for line in cells(list(rows.values()))[1]] == [
        "scored",
        "unfinished, step 7 of 20",
        "finished, best at step 5 of 20",
        "damaged",
    ]


def test_recoveries_are_listed_with_their_divergence(tmp_path: Path) -> None:
    write_run(tmp_path / "begun", 5)
    write_run(tmp_path / "done", 10, finished=True)
    write_run(tmp_path / "torn", 0)
    (tmp_path / "torn" / TRAINING_RECORD).write_text("{}")
    begun, done, torn = runs_in(tmp_path)
    assert (begun["kind"], begun["state"], begun["step"], begun["steps"]) == ("recovery", "recovering", 5, 10)
    assert (begun["divergence_before"], begun["divergence"], begun["best_step"]) == (1.25, 1.05, 4)
    assert (done["state"], done["tokens"], done["divergence"], done["model"]) == (
        "finished",
        10240,
        0.75,
        "models/pruned",
    )
    assert torn["state"] == "damaged"
    _, lines = cells([begun, done, torn])
    assert [line[1] for line in lines] == [
        "unfinished recovery, step 5 of 10",
        "recovered, best at step 10 of 10",
        "damaged",
    ]
    assert lines[1][4] == "KL 1.2500 → 0.7500"


def test_a_damaged_run_is_listed_beside_the_others(tmp_path: Path) -> None:
    for name in ("bytes", "null", "sparsity", "whole"):
        write_unfinished_run(tmp_path / name, 3)
    (tmp_path / "null" / METRICS_FILE).write_text("null\n")
    (tmp_path / "bytes" / METRICS_FILE).write_bytes(b'{"step": 1}\n{"step": "\xff"}\n')
    (tmp_path / "sparsity" / DECISION_MASKS).touch()
    write_json(tmp_path / "sparsity" / DECISION_RECORD, DECIDED | {"sparsity": "0.2222", "sha256": "0"})
    write_run(tmp_path / "recovery", 2)
    with (tmp_path / "recovery" / TRAINING_HISTORY).open("ab") as file:
        file.write(b"\xff\n")
    rows = {Path(row["run"]).name: row for row in runs_in(tmp_path)}
    assert len(cells(list(rows.values()))[1]) == 5
    assert rows.pop("whole")["state"] == "searching"
    assert {row["state"] for row in rows.values()} == {"damaged"}
    for name, file in {
        "bytes": f"{METRICS_FILE}:2",
        "null": f"{METRICS_FILE}:1",
        "sparsity": DECISION_RECORD,
        "recovery": f"{TRAINING_HISTORY}:4",
    }.items():
        says(rows[name]["fault"], str(tmp_path / name / file))


def test_links_in_a_circle_are_entered_once_and_a_link_to_a_run_is_a_run(tmp_path: Path) -> None:
    write_unfinished_run(tmp_path / "b" / "run", 1)
    for number in range(20):
        (tmp_path / "b" / f"l{number}").symlink_to(".")
        (tmp_path / f"l{number}").symlink_to(".")
    (tmp_path / "latest").symlink_to("b/run")
    assert [Path(row["run"]).relative_to(tmp_path).as_posix() for row in runs_in(tmp_path)] == ["b/run", "latest"]


def test_a_folder_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    write_unfinished_run(tmp_path / "b", 1)
    iterdir = Path.iterdir

    def refusing(folder: Path) -> Iterator[Path]:
        if folder.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refusing)
    assert [Path(row["run"]).name for row in runs_in(tmp_path)] == ["b"]


def test_runs_in_refuses_a_missing_directory(tmp_path: Path) -> None:
    with refused("nowhere", "no such directory"):
        runs_in(tmp_path / "nowhere")
    assert runs_in(tmp_path) == []
