"""Pruning from Python, and the notebook that shows it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from helpers.recipes import SMALL
from helpers.schemas import validate

from pgprune_cli import prune
from pgprune_cli.errors import UserError
from pgprune_cli.storage.records import read_record

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
SETTINGS = {
    key: json.loads(value) if value[0].isdigit() else value for key, _, value in (s.partition("=") for s in SMALL)
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, pgprune_cli; assert not {'torch', 'numpy', 'yaml', 'rich', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; assert callable(pgprune_cli.prune)"], check=True)


def test_three_lines_prune_measure_and_export() -> None:
    small = prune("demo", SETTINGS | {"evaluation.seqlen": [64], "evaluation.corpora": ["demo"]})
    measured = small.evaluate()
    model = small.export("models/small")
    assert repr(small) == f"Pruned('runs/demo': demo, sparsity {small.decision.sparsity:.4f})"
    assert [(row["corpus"], row["seqlen"]) for row in measured["perplexity"]] == [("demo", 64)]
    validate("eval", measured)
    assert read_record(Path("runs/demo/evaluation.json")) == measured
    assert (model / "config.json").exists()
    assert prune("demo", SETTINGS | {"evaluation.seqlen": [64]}).decision.recipe == small.decision.recipe
    with pytest.raises(UserError, match="exists already"):
        small.export("models/small")


def test_settings_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set search\.forward=3: unknown key, did you mean search\.forward_passes\?"):
        prune("demo", {"search.forward": 3})
    with pytest.raises(UserError, match=r'a "b" # c: no such directory'):
        prune("demo", {"model": 'a "b" # c', "calibration.corpus": tmp_path})


def test_the_notebook_runs_and_was_run_from_top_to_bottom() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "__main__"}
    with redirect_stdout(io.StringIO()):
        for cell in cells:
            exec("".join(cell["source"]), names)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert any(cell["outputs"] for cell in cells)
