"""Generated files match the code, and `make docs` installs only what it needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.scripts import script_module

ROOT = Path(__file__).parents[2]
REFERENCES = ("write_cli_reference", "write_recipe_reference", "draw_method", "draw_imports", "support_matrix")


def test_write_or_check_writes_pages_and_check_reports_stale_ones(tmp_path: Path, monkeypatch) -> None:
    write_or_check = script_module("reference").write_or_check
    first, second = tmp_path / "one.md", tmp_path / "other.md"
    monkeypatch.setattr(sys, "argv", ["write", "--check"])
    with pytest.raises(SystemExit, match=r"one\.md: .*the code.*make references"):
        write_or_check({first: "1"}, "the code")
    assert not first.exists()
    monkeypatch.setattr(sys, "argv", ["write"])
    write_or_check({first: "1", second: "2"}, "the code")
    monkeypatch.setattr(sys, "argv", ["write", "--check"])
    write_or_check({first: "1", second: "2"}, "the code")
    with pytest.raises(SystemExit, match=r"other\.md: "):
        write_or_check({first: "1", second: "3"}, "the code")
    assert (first.read_text(), second.read_text()) == ("1", "2")


@pytest.mark.parametrize("script", REFERENCES)
def test_generated_files_are_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / f"scripts/{script}.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_docs_installs_only_the_docs_extra(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    planned = subprocess.run(
        ["make", "--dry-run", "docs", f"VENV={tmp_path / 'new'}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert '-e ".[docs]"' in planned.stdout
    assert "[dev]" not in planned.stdout
    for script in REFERENCES:
        assert f"scripts/{script}.py" in planned.stdout
