"""A run beside another, a terminal that closes, a reader that leaves: refused, or saved; never lost."""

from __future__ import annotations

import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.faults_bench import JOBS, outcome

LONG = ["--set", "search.forward_passes=100000", "--set", "search.checkpoint_every=50000"]


def started(bench, folder: Path, **options) -> subprocess.Popen:
    """A long search in a process of its own, which has begun to take steps."""
    folder.mkdir(exist_ok=True)
    command = [word.format(base=bench.base) for word in JOBS["search"][-1]]
    program = [sys.executable, "-m", "pgprune_cli", *command, *LONG]
    process = subprocess.Popen(program, cwd=folder, start_new_session=True, **options)
    deadline = time.monotonic() + 200
    while not (folder / "run/metrics.jsonl").exists() or not (folder / "run/metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def saved(folder: Path) -> bool:
    return len(list((folder / "run/checkpoints").glob("step-*/state.json"))) == 1


def test_a_second_process_is_refused_and_a_third_goes_on_after_a_kill(bench, tmp_path) -> None:
    folder = tmp_path / "folder"
    process = started(bench, folder, stderr=subprocess.DEVNULL)
    for job in ("search", "init-scores"):
        ended = bench.run(folder, JOBS[job][-1])
        assert ended.code == 2
        assert ended.said.count("\n") == 1
        assert ended.said.startswith(f"pgprune: run: in use by process {process.pid} on ")
    process.kill()
    process.wait()
    (folder / "run/recipe.yaml").unlink()  # the long search's, which is another
    assert bench.run(folder, JOBS["search"][-1]).code == 0
    assert outcome(folder) == bench.of("search").left


@pytest.mark.parametrize(
    ("job", "name"),
    [
        *((job, name) for job in ("search", "compare") for name in ("SIGINT", "SIGTERM", "SIGHUP")),
        ("init-scores", "SIGHUP"),
        ("export", "SIGTERM"),
    ],
)
def test_a_signal_at_any_moment_costs_nothing(bench, job, name) -> None:
    """What is saved is said, and how to go on where something is left to do."""
    folder = bench.folder(job)
    at = random.Random(job + name).randint(1, len(bench.of(job).points) - 5)
    ended = bench.run(folder, JOBS[job][-1], fault={"at": at, "kind": name})
    assert ended.code == 128 + getattr(signal, name), ended.said
    assert "Traceback" not in ended.said
    command = shlex.join(["pgprune", *(word.format(base=bench.base) for word in JOBS[job][-1])])
    assert "pgprune: stopped: " in ended.said
    assert ended.said.endswith(f". Resume with: {command}\n") == (not (folder / "small").exists())
    assert not list(folder.rglob("*.tmp"))
    bench.ends_as_if_undisturbed(job, folder)


def test_a_comparison_has_its_directory_to_itself(bench, tmp_path) -> None:
    from pgprune_cli.run.lock import locked

    folder = tmp_path / "folder"
    with locked(folder / "table"):
        ended = bench.run(folder, JOBS["compare"][-1])
    assert ended.code == 2
    assert ended.said.startswith(f"pgprune: table: in use by process {os.getpid()} on ")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_that_closes_saves_the_search(bench, tmp_path, quiet, request) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    shell = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&1', name]  # a new session's first terminal becomes its own
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [word.format(base=bench.base) for word in JOBS["search"][-1]] + LONG + (["--quiet"] if quiet else [])
    program = [*shell, sys.executable, "-m", "pgprune_cli", *command]
    process = subprocess.Popen(program, cwd=folder, start_new_session=True)
    request.addfinalizer(process.kill)
    os.close(theirs)
    history, deadline = folder / "run/metrics.jsonl", time.monotonic() + 200
    os.set_blocking(ours, False)
    while not history.exists() or not history.stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)
    os.close(ours)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert saved(folder)


def test_a_reader_that_leaves_stops_nothing(bench, tmp_path) -> None:
    """As of `pgprune search … 2>&1 | head -1`."""
    folder = tmp_path / "folder"
    process = started(bench, folder, stderr=subprocess.PIPE)
    process.stderr.close()
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert saved(folder)
