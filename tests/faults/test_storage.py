"""Disks that are full, read-only, over quota, forbidden, broken or slow: one clear line, and nothing half-written."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults_bench import JOBS, outcome

ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO")
ADVICE = {"ENOSPC": "make room", "EDQUOT": "make room", "EROFS": "make it writable", "EACCES": "make it writable"}
FULL = "make room"


def refused(ended, kind: str) -> None:
    """Asserts that a command failed with one line: what happened, to which file, what to do."""
    assert (ended.code, "Traceback" in ended.said) == (1, False), ended.said
    *_, line = ended.said.splitlines()
    assert line.startswith("pgprune: ") and os.strerror(getattr(errno, kind)) in line, ended.said
    assert ADVICE.get(kind, "look after the disk") in line
    assert ".tmp" not in line.partition(": ")[2].partition(": ")[0], f"names a file that nobody asked for: {line}"


def fails_at(bench, job: str, at: int, kind: str) -> None:
    folder = bench.folder(job)
    ended = bench.run(folder, JOBS[job][-1], fault={"at": at, "kind": kind})
    if ended.code == 0:  # it was only to tidy up
        assert outcome(folder) == bench.of(job).left
    else:
        refused(ended, kind)
    bench.ends_as_if_undisturbed(job, folder)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("job", ["search", "widths", "export"])
def test_a_disk_that_fails_from_some_change_on_costs_nothing(bench, job, kind) -> None:
    fails_at(bench, job, random.Random(job + kind).randint(1, len(bench.of(job).points)), kind)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_a_disk_that_fails_from_any_change_on_costs_nothing(bench, job) -> None:
    for at in range(1, len(bench.of(job).points) + 1):
        fails_at(bench, job, at, ERRORS[at % len(ERRORS)])


@pytest.mark.parametrize(
    ("job", "limit"), [("init-scores", 300), ("search", 600), ("search", 5000), ("widths", 9000), ("export", 20000)]
)
def test_a_file_cut_in_the_middle_of_a_write_does_not_stay(bench, job, limit) -> None:
    """The kernel's own limit of a file's size: the write itself fails, half-way."""
    folder = bench.folder(job)
    ended = bench.run(folder, [*JOBS[job][-1], "--quiet"], bytes=limit)
    assert ended.code == 1 and "File too large" in ended.said and FULL in ended.said, ended.said
    bench.ends_as_if_undisturbed(job, folder)


@pytest.mark.parametrize("job", JOBS)
def test_an_fsync_that_fails_is_said_and_costs_nothing(bench, job) -> None:
    """By then the bytes may be gone: what was to be synced does not get its name."""
    syncs = [at for at, (event, *_) in enumerate(bench.of(job).points, 1) if event == "fsync"]
    fails_at(bench, job, random.Random(job).choice(syncs), "EIO")


def test_a_slow_fsync_changes_nothing(bench) -> None:
    folder = bench.folder("search")
    ended = bench.run(folder, JOBS["search"][-1], fault={"slow": 0.02})
    assert ended.code == 0 and ended.seconds > 0.02 * sum(event == "fsync" for event, *_ in bench.of("search").points)
    assert outcome(folder) == bench.of("search").left


# --- a real file system


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def room(place: Path) -> int:
    return shutil.disk_usage(place).free


@pytest.mark.parametrize("left", [0, 4, 8, 16, 24, 36, 44])
def test_a_search_on_a_real_full_disk_goes_on_when_there_is_room(bench, small_disk, left) -> None:
    (small_disk / "ballast").write_bytes(bytes(room(small_disk) - left * 1024))
    ended = bench.run(small_disk, JOBS["search"][-1])
    refused(ended, "ENOSPC")
    remount(small_disk, "size=4m")
    (small_disk / "ballast").unlink()
    ended = bench.run(small_disk, JOBS["search"][-1])
    assert ended.code == 0, ended.said
    assert outcome(small_disk) == bench.of("search").left


def test_a_search_on_a_real_read_only_disk_is_refused_and_a_finished_one_answers(bench, small_disk) -> None:
    remount(small_disk, "ro")
    refused(bench.run(small_disk, JOBS["search"][-1]), "EROFS")
    remount(small_disk, "rw,size=4m")
    assert bench.run(small_disk, JOBS["search"][-1]).code == 0
    remount(small_disk, "ro")
    ended = bench.run(small_disk, JOBS["search"][-1])
    assert ended.code == 0, ended.said
    assert outcome(small_disk) == bench.of("search").left
