"""The references made from the code: written, or only held against it; and what `make docs` installs for that."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.scripts import script_module

ROOT = Path(__file__).parents[2]


def test_pages_are_written_and_held_against_what_they_should_be(tmp_path: Path, monkeypatch) -> None:
    write_or_check = script_module("reference").write_or_check
    one, other = tmp_path / "one.md", tmp_path / "other.md"
    monkeypatch.setattr(sys, "argv", ["write", "--check"])
    with pytest.raises(SystemExit, match=r"^one.md is not what the code says; run `make references`$"):
        write_or_check({one: "1"}, "the code")
    assert not one.exists()
    monkeypatch.setattr(sys, "argv", ["write"])
    write_or_check({one: "1", other: "2"}, "the code")
    monkeypatch.setattr(sys, "argv", ["write", "--check"])
    write_or_check({one: "1", other: "2"}, "the code")
    with pytest.raises(SystemExit, match=r"^other.md is not what"):
        write_or_check({one: "1", other: "3"}, "the code")
    assert (one.read_text(), other.read_text()) == ("1", "2")


@pytest.mark.parametrize("script", ["write_cli_reference", "write_recipe_reference"])
def test_the_references_are_what_the_code_says(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / f"scripts/{script}.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_site_needs_no_more_than_its_own_extra(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    planned = subprocess.run(
        ["make", "--dry-run", "docs", f"VENV={tmp_path / 'new'}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert '-e ".[docs]"' in planned.stdout
    assert "[dev]" not in planned.stdout
    for script in ("write_cli_reference", "write_recipe_reference", "draw_method"):
        assert f"scripts/{script}.py" in planned.stdout
