"""The Makefile installs the right torch, and refuses an old Python before it downloads anything."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# Notes its arguments. As a Python it creates environments with itself in them; pip fails for what UNREACHABLE names.
FAKE = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
    *version_info*) exit ${{OLD:-0}};;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
    *"${{UNREACHABLE:-nothing}}"*) exit 1;;
esac
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs make in a copy with a simulated Python. It returns the process and pip's commands."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # The tests themselves may have been started by make, which hands its variables down to every make below it.
    for variable in ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "VENV"):
        monkeypatch.delenv(variable, raising=False)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE.format(log=log))
    python.chmod(0o755)

    def make(*variables: str, target: str = ".venv/bin/pgprune") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        command = ["make", target, f"PYTHON={python}", *variables]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return process, [line for line in log.read_text().splitlines() if "pip install" in line]

    return make


def test_a_machine_without_a_gpu_gets_the_cpu_build(made) -> None:
    index = "https://download.pytorch.org/whl/cpu"
    process, (torch, project) = made("CUDA=", f"CPU_INDEX={index}")
    assert process.returncode == 0
    assert f"--index-url {index} torch==" in torch
    assert project.endswith("-e .[recovery]") and index not in project


def test_an_unreachable_index_falls_back_to_pypi(made, monkeypatch) -> None:
    monkeypatch.setenv("UNREACHABLE", "download.pytorch.org")
    process, (tried, torch, _) = made("CUDA=", "CPU_INDEX=https://download.pytorch.org/whl/cpu")
    assert process.returncode == 0
    assert "download.pytorch.org" in tried
    assert "index-url" not in torch and "torch==" in torch


def test_a_machine_with_a_gpu_gets_the_newest_build_of_pypi(made) -> None:
    process, (torch, _) = made("CUDA=1")
    assert process.returncode == 0
    assert torch.endswith(" torch") and "index-url" not in torch


def test_an_old_python_is_refused_before_anything_is_downloaded(made, monkeypatch) -> None:
    monkeypatch.setenv("OLD", "1")
    process, installed = made()
    assert process.returncode != 0 and not installed
    assert "Python 3.11" in process.stdout and "make PYTHON=" in process.stdout


def test_the_oldest_versions_tested_are_those_that_the_project_allows(made) -> None:
    required = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    lowest = {requirement.name: next(iter(requirement.specifier)).version for requirement in required}
    _, installed = made("CUDA=1", target=".venv-oldest/.installed")
    assert any(f" torch=={lowest['torch']}.0" in line for line in installed)
    assert any(f" transformers=={lowest['transformers']}.0 " in line for line in installed)
