"""The history of a recovery is read back, cut back to a checkpoint, and refused when it is damaged."""

from pathlib import Path

import pytest
from helpers.messages import refused

from pgprune_cli.run.layout import TRAINING_HISTORY, training_checkpoint_folder, training_checkpoint_folders
from pgprune_cli.run.training_history import TrainingHistory, TrainingRow, best_training_row, read_training_history
from pgprune_cli.storage.rows import Written, cut_back

START = TrainingRow(0, 0, None, None, 1.5, None, None, 10**9, 2.0)
STEPS = [TrainingRow(step, 1024 * step, 1.2, 1.1, 1.4 - step / 10, 1e-3, 900.0, 10**9, 3.0) for step in (1, 2)]


def append(run: Path, *rows: TrainingRow) -> Written:
    with TrainingHistory(run) as history:
        for row in rows:
            history.append(row)
        return history.flush()


def test_training_history_is_read_back_without_an_unfinished_line(tmp_path: Path) -> None:
    append(tmp_path, START, *STEPS)
    with (tmp_path / TRAINING_HISTORY).open("a") as file:
        file.write('{"step": 3')
    rows = read_training_history(tmp_path)
    assert rows == [START, *STEPS]
    assert best_training_row(rows) == STEPS[-1]


def test_training_history_is_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    written = append(tmp_path, START, STEPS[0])
    append(tmp_path, STEPS[1])
    cut_back(tmp_path / TRAINING_HISTORY, written)
    assert read_training_history(tmp_path) == [START, STEPS[0]]
    cut_back(tmp_path / TRAINING_HISTORY, None)
    assert read_training_history(tmp_path) == []


@pytest.mark.parametrize("damage", [b"", b'{"step": 1}\n' * 30])
def test_another_training_history_is_refused(tmp_path: Path, damage: bytes) -> None:
    written = append(tmp_path, START, STEPS[0])
    (tmp_path / TRAINING_HISTORY).write_bytes(damage)
    with refused(TRAINING_HISTORY, "damaged"):
        cut_back(tmp_path / TRAINING_HISTORY, written)


def test_damaged_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / TRAINING_HISTORY).write_text('{"step": 1}\n')
    with refused(f"{TRAINING_HISTORY}:1: damaged"):
        read_training_history(tmp_path)


def test_training_checkpoints_are_sorted_by_step(tmp_path: Path) -> None:
    folders = [training_checkpoint_folder(tmp_path, step) for step in (9, 80, 100)]
    for folder in [*folders, folders[0].with_name("checkpoint-damaged")]:
        folder.mkdir(parents=True)
    assert training_checkpoint_folders(tmp_path) == folders
