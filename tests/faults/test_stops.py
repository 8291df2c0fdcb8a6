"""A second process is refused; after a signal, a closed terminal or a closed pipe, the work so far is saved."""

from __future__ import annotations

import os
import pty
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.faults_bench import JOBS, contents_of
from helpers.waiting import lines_in, wait_until

from pgprune_cli.run.lock import locked

HISTORY = "run/metrics.jsonl"
ENDLESS = ["--set", "search.forward_passes=100000", "--set", "search.checkpoint_every=50000"]


def endless_search(bench, *options: str) -> list[str]:
    """Return the command of a search that runs until it is stopped, and saves nothing before."""
    return [sys.executable, "-m", "pgprune_cli", *bench.arguments(JOBS["search"][-1]), *ENDLESS, *options]


@contextmanager
def started(command: list[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """Yield a process in a session of its own, and kill it if the test has not ended it."""
    with subprocess.Popen(command, cwd=folder, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def checkpoints(folder: Path) -> int:
    return len(list((folder / "run/checkpoints").glob("step-*/state.json")))


def test_a_run_in_use_is_refused_and_free_again_after_a_kill(bench, folder) -> None:
    with started(endless_search(bench), folder, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: lines_in(folder / HISTORY) > 0, process)
        for job in ("search", "init-scores"):
            ended = bench.run(folder, JOBS[job][-1])
            assert ended.code == 2
            assert ended.stderr.count("\n") == 1
            assert ended.stderr.startswith("pgprune: run: ") and f"process {process.pid} on " in ended.stderr
        process.kill()
    (folder / "run/recipe.yaml").unlink()  # that of the endless search, which is another recipe
    assert bench.run(folder, JOBS["search"][-1]).code == 0
    assert contents_of(folder) == bench.undisturbed("search").contents


@pytest.mark.parametrize(
    ("job", "name"),
    [
        *((job, name) for job in ("search", "compare") for name in ("SIGINT", "SIGTERM", "SIGHUP")),
        ("init-scores", "SIGHUP"),
        ("export", "SIGTERM"),
    ],
)
def test_a_job_stopped_by_a_signal_says_how_to_resume_and_completes_when_repeated(bench, job, name) -> None:
    """An export that is complete when the signal comes has nothing to resume."""
    folder = bench.folder(job)
    at = random.Random(job + name).randint(1, len(bench.undisturbed(job).changes) - 5)
    ended = bench.run(folder, JOBS[job][-1], fault={"at": at, "kind": name})
    assert ended.code == 128 + getattr(signal, name), ended.stderr
    assert "Traceback" not in ended.stderr
    command = shlex.join(["pgprune", *bench.arguments(JOBS[job][-1])])
    assert (command in ended.stderr.splitlines()[-1]) == (not (folder / "small").exists())
    assert not list(folder.rglob("*.tmp"))
    bench.assert_repeating_completes(job, folder)


def test_a_comparison_in_use_is_refused(bench, folder) -> None:
    with locked(folder / "table"):
        ended = bench.run(folder, JOBS["compare"][-1])
    assert ended.code == 2
    assert ended.stderr.startswith("pgprune: table: ") and f"process {os.getpid()} on " in ended.stderr


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=["", "quiet"])
def test_a_search_whose_terminal_closes_is_saved(bench, folder, options) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    controller, terminal = pty.openpty()
    # In a new session, the first terminal that a process opens becomes its controlling terminal.
    shell = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&1', os.ttyname(terminal)]
    with started([*shell, *endless_search(bench, *options)], folder) as process:
        os.set_blocking(controller, False)

        def has_taken_a_step() -> bool:
            with suppress(BlockingIOError):
                os.read(controller, 1 << 16)  # else the terminal's buffer fills up and the search waits
            return lines_in(folder / HISTORY) > 0

        wait_until(has_taken_a_step, process)
        os.close(terminal)
        os.close(controller)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert checkpoints(folder) == 1


def test_a_search_continues_when_the_reader_of_its_output_leaves(bench, folder) -> None:
    """As in `pgprune search … 2>&1 | head -1`."""
    with started(endless_search(bench), folder, stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        process.stderr.close()
        steps = lines_in(folder / HISTORY)
        wait_until(lambda: lines_in(folder / HISTORY) >= steps + 5, process)
        process.send_signal(signal.SIGTERM)  # the message about it goes to the closed pipe, too
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert checkpoints(folder) == 1
