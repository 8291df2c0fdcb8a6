"""report: where the page goes, that it is written again while a search is running, and what is refused."""

from __future__ import annotations

import shutil
import sys

import pytest
from helpers.messages import refused

from pgprune_cli.jobs import report as job


def test_the_page_goes_into_the_run_or_for_several_into_the_working_directory(finished, tmp_path, monkeypatch) -> None:
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


def test_watching_ends_when_the_search_is_finished(finished, searching, monkeypatch) -> None:
    pytest.importorskip("altair", reason="pgprune[report] is not installed")
    waits = []

    def finish(seconds: int) -> None:
        waits.append(seconds)
        assert 'http-equiv="refresh"' in (searching / "report.html").read_text()
        if len(waits) == 2:
            for name in ("decision.safetensors", "decision.json"):
                shutil.copy(finished["units"] / name, searching)

    monkeypatch.setattr(job.time, "sleep", finish)
    states = [runs[0].progress for runs in job.report([searching], watch=7)]
    assert states == ["step 6 of 6", "step 6 of 6", "finished"]
    assert waits == [7, 7]
    assert 'http-equiv="refresh"' not in (searching / "report.html").read_text()


def test_report_refuses_to_run_without_its_extra(finished, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with refused("vl_convert", "pip install 'pgprune[report]'"):
        next(job.report([finished["units"]]))
