"""The Python API, and the notebook that shows it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from helpers.messages import refused
from helpers.recipes import SMALL
from helpers.schemas import validate

from pgprune_cli import evaluate, prune
from pgprune_cli.storage.records import read_record

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
SETTINGS = {
    key: json.loads(value) if value[0].isdigit() else value for key, _, value in (s.partition("=") for s in SMALL)
}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, pgprune_cli; assert not {'torch', 'numpy', 'yaml', 'rich', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; assert callable(pgprune_cli.prune)"], check=True)


def test_prune_evaluate_and_export() -> None:
    small = prune("demo", SETTINGS | {"evaluation.seqlen": [64], "evaluation.corpora": ["demo"]})
    measured = small.evaluate()
    model = small.export("models/small")
    assert repr(small) == f"Pruned('runs/demo': demo, sparsity {small.decision.sparsity:.4f})"
    assert [(row["corpus"], row["seqlen"]) for row in measured["perplexity"]] == [("demo", 64)]
    validate("eval", measured)
    assert read_record(Path("runs/demo/evaluation.json")) == measured
    assert (model / "config.json").exists()
    assert prune("demo", SETTINGS | {"evaluation.seqlen": [64]}).decision.recipe == small.decision.recipe
    with refused("models/small", "already exists"):
        small.export("models/small")
    compared = small.evaluate(corpora=["demo"], seqlens=[64], max_windows=2, baselines=["demo"])
    validate("eval", compared)
    assert [baseline["model"] for baseline in compared["baselines"]] == ["demo"]
    assert read_record(Path("runs/demo/evaluation.json")) == measured  # a partial evaluation is not stored
    with refused("runs/demo: ", "pgprune export"):
        small.evaluate(speed=True)
    timed = evaluate(model, speed=True)
    validate("eval", timed)
    assert timed["perplexity"] == []
    assert timed["speed"].keys() == timed["baselines"][0]["speed"].keys()


def test_prune_reads_settings_as_the_command_line_does(tmp_path: Path) -> None:
    with refused("--set search.forward=3: ", "search.forward_passes"):
        prune("demo", {"search.forward": 3})
    with refused('a "b" # c: '):
        prune("demo", {"model": 'a "b" # c', "calibration.corpus": tmp_path})


def test_notebook_runs_and_was_saved_after_a_run_from_top_to_bottom() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "__main__"}
    with redirect_stdout(io.StringIO()):
        for cell in cells:
            exec("".join(cell["source"]), names)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert any(cell["outputs"] for cell in cells)
