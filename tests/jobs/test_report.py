"""The report job: where the page goes, that it is written again while a search goes on, and what it refuses."""

from __future__ import annotations

import shutil
import sys

import pytest

from pgprune_cli.errors import UserError
from pgprune_cli.jobs import report as job


def test_one_run_has_its_report_in_it_and_several_here(finished, tmp_path, monkeypatch) -> None:
    pytest.importorskip("altair", reason="pgprune[report] is not installed")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished["units"], run)
    (runs,) = job.report([run])
    assert [run.progress for run in runs] == ["finished"]
    (runs,) = job.report([run, finished["widths"]])
    (runs,) = job.report([run], tmp_path / "elsewhere" / "it.html")
    for page in (run / "report.html", tmp_path / "report.html", tmp_path / "elsewhere" / "it.html"):
        assert page.read_text().startswith("<!doctype html>")


def test_watching_ends_with_the_search(finished, searching, monkeypatch) -> None:
    pytest.importorskip("altair", reason="pgprune[report] is not installed")
    waited = []

    def finish(seconds: int) -> None:
        waited.append(seconds)
        assert 'http-equiv="refresh"' in (searching / "report.html").read_text()
        if len(waited) == 2:
            for name in ("decision.safetensors", "decision.json"):
                shutil.copy(finished["units"] / name, searching)

    monkeypatch.setattr(job.time, "sleep", finish)
    states = [runs[0].progress for runs in job.report([searching], watch=7)]
    assert states == ["step 6 of 6", "step 6 of 6", "finished"]
    assert waited == [7, 7]
    assert 'http-equiv="refresh"' not in (searching / "report.html").read_text()


def test_without_the_extra_it_says_what_to_install(finished, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"^report needs the extra: pip install 'pgprune\[report\]' "):
        next(job.report([finished["units"]]))
