"""The history of a search is read back, and damaged rows are refused."""

import json
from pathlib import Path

from helpers.messages import refused

from pgprune_cli.run.history import History, Row, read_history
from pgprune_cli.run.layout import METRICS_FILE

ROW = Row(1, [3.0, None], 3.5, 0.02, 9.0, 2.75, 1, 1000.0, 10**9, 10.0, {"attention": [2], "ffn": [5]})


def append(run: Path, *rows: Row) -> None:
    with History(run) as history:
        for row in rows:
            history.append(row)


def test_history_is_read_back_without_an_unfinished_line(tmp_path: Path) -> None:
    append(tmp_path, ROW)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 2')
    assert read_history(tmp_path) == [ROW]


def test_history_is_refused_when_a_row_has_no_kept_counts(tmp_path: Path) -> None:
    append(tmp_path, ROW)
    path = tmp_path / METRICS_FILE
    row = json.loads(path.read_text())
    del row["kept"]
    path.write_text(json.dumps(row) + "\n")
    with refused(f"{path}:1: damaged"):
        read_history(tmp_path)
