"""Disks that are full, read-only, over quota, forbidden or broken: one clear line, and nothing half-written."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults_bench import JOBS, contents_of

ADVICE = {
    "ENOSPC": "Make room",
    "EDQUOT": "Make room",
    "EROFS": "Make it writable",
    "EACCES": "Make it writable",
    "EIO": "disk",
}
"""What the message about an error tells the user to do."""


def assert_refused(ended, kind: str) -> None:
    """Fail unless the command failed with one line that says what happened, to which file, and what to do."""
    assert (ended.code, "Traceback" in ended.stderr) == (1, False), ended.stderr
    *_, line = ended.stderr.splitlines()
    assert line.startswith("pgprune: ") and os.strerror(getattr(errno, kind)) in line, ended.stderr
    assert ADVICE[kind] in line
    assert ".tmp" not in line.partition(": ")[2].partition(": ")[0], f"names a temporary file: {line}"


def fail_from_change(bench, job: str, at: int, kind: str) -> None:
    """Let the disk fail from a change on. Fails unless the job is refused or done, and completes when repeated."""
    folder = bench.folder(job)
    ended = bench.run(folder, JOBS[job][-1], fault={"at": at, "kind": kind})
    if ended.code == 0:  # only tidying up failed
        assert contents_of(folder) == bench.undisturbed(job).contents
    else:
        assert_refused(ended, kind)
    bench.assert_repeating_completes(job, folder)


@pytest.mark.parametrize("kind", ADVICE)
@pytest.mark.parametrize("job", ["search", "widths", "export"])
def test_a_job_on_a_disk_that_starts_to_fail_is_refused_and_completes_when_repeated(bench, job, kind) -> None:
    changes = len(bench.undisturbed(job).changes)
    fail_from_change(bench, job, random.Random(job + kind).randint(1, changes), kind)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_on_a_disk_that_fails_from_any_change_on_is_refused_and_completes_when_repeated(bench, job) -> None:
    kinds = list(ADVICE)
    for at in range(1, len(bench.undisturbed(job).changes) + 1):
        fail_from_change(bench, job, at, kinds[at % len(kinds)])


@pytest.mark.parametrize(
    ("job", "size"), [("init-scores", 300), ("search", 600), ("search", 5000), ("widths", 9000), ("export", 20000)]
)
def test_a_file_whose_write_fails_half_way_is_removed(bench, job, size) -> None:
    """With the kernel's limit on the size of a file, the write itself fails."""
    bench.undisturbed(job)  # fills the token cache, so that the write is one into the folder
    folder = bench.folder(job)
    ended = bench.run(folder, [*JOBS[job][-1], "--quiet"], file_size_limit=size)
    assert ended.code == 1
    assert os.strerror(errno.EFBIG) in ended.stderr and ADVICE["ENOSPC"] in ended.stderr, ended.stderr
    assert not list(folder.rglob("*.tmp"))
    bench.assert_repeating_completes(job, folder)


@pytest.mark.parametrize("job", JOBS)
def test_a_failing_fsync_is_reported_and_the_job_completes_when_repeated(bench, job) -> None:
    """After it the bytes may be lost, so the file does not get its name."""
    syncs = [at for at, (event, *_) in enumerate(bench.undisturbed(job).changes, 1) if event == "fsync"]
    fail_from_change(bench, job, random.Random(job).choice(syncs), "EIO")


# --- a real file system


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.mark.parametrize("free_kilobytes", [0, 4, 8, 16, 24, 36, 44])
def test_a_search_on_a_full_disk_is_refused_and_completes_once_there_is_room(bench, small_disk, free_kilobytes) -> None:
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - free_kilobytes * 1024))
    assert_refused(bench.run(small_disk, JOBS["search"][-1]), "ENOSPC")
    remount(small_disk, "size=4m")
    (small_disk / "ballast").unlink()
    ended = bench.run(small_disk, JOBS["search"][-1])
    assert ended.code == 0, ended.stderr
    assert contents_of(small_disk) == bench.undisturbed("search").contents


def test_a_search_on_a_read_only_disk_is_refused_unless_it_is_finished(bench, small_disk) -> None:
    remount(small_disk, "ro")
    ended = bench.run(small_disk, JOBS["search"][-1])
    assert (ended.code, len(ended.stderr.splitlines())) == (2, 1), ended.stderr  # by a check, before anything is loaded
    assert str(small_disk) in ended.stderr and "not writable" in ended.stderr
    remount(small_disk, "rw,size=4m")
    assert bench.run(small_disk, JOBS["search"][-1]).code == 0
    remount(small_disk, "ro")
    ended = bench.run(small_disk, JOBS["search"][-1])
    assert ended.code == 0, ended.stderr
    assert contents_of(small_disk) == bench.undisturbed("search").contents
