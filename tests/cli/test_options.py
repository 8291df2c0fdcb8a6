"""Shell completion, as a shell asks for it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pgprune se", ["search"]),
        ("pgprune search smol", ["smollm2-135m-20", "smollm2-135m-30", "smollm2-135m-50"]),
        ("pgprune search mistr", ["mistral-7b-20", "mistral-7b-30", "mistral-7b-50"]),
        ("pgprune search mine", ["mine.yaml"]),
        ("pgprune recipes show paper/smollm2-135m-2", ["paper/smollm2-135m-20"]),
        ("pgprune export runs/", ["runs/a", "runs/compare/b"]),
        ("pgprune eval ", ["demo", "models/small", "runs/a", "runs/compare/b"]),
        ("pgprune report ", ["runs/a", "runs/compare/b", "runs/recovered"]),
        ("pgprune recover ", ["models/small"]),
        ("pgprune init-scores demo --metric ma", ["magnitude"]),
    ],
)
def test_the_shell_is_offered_what_there_is(line, offered, tmp_path: Path) -> None:
    for run in ("runs/a", "runs/compare/b"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "scores.safetensors").touch()
    (tmp_path / "runs" / "recovered").mkdir()
    for name in ("recipe.yaml", "training.json"):
        (tmp_path / "runs" / "recovered" / name).touch()
    (tmp_path / "models" / "small").mkdir(parents=True)
    for name in ("config.json", "decision.json"):
        (tmp_path / "models" / "small" / name).touch()
    (tmp_path / "mine.yaml").touch()
    code = (
        "import sys; from pgprune_cli.cli.program import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    asked = {"_PGPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | asked | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split() == offered
