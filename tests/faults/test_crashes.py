"""After kill -9 at any moment, repeating the command completes its work. A power cut loses nothing that was done."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from helpers.faults_bench import JOBS, contents_of

KILLED = -signal.SIGKILL
KILLED_IN_A_WRITE = -signal.SIGXFSZ


def kill_at_change(bench, job: str, at: int) -> None:
    """Kill the job just before a change to the disk, and fail unless repeating it completes it."""
    folder = bench.folder(job)
    ended = bench.run(folder, JOBS[job][-1], fault={"at": at, "kind": "kill"})
    assert ended.code == KILLED, ended.stderr
    bench.assert_repeating_completes(job, folder)


@pytest.mark.parametrize(
    ("job", "kills"), [("init-scores", 2), ("search", 6), ("widths", 3), ("export", 4), ("compare", 3)]
)
def test_a_job_killed_at_a_change_to_the_disk_completes_when_repeated(bench, job, kills) -> None:
    numbers = range(1, len(bench.undisturbed(job).changes) + 1)
    for at in random.Random(job).sample(numbers, kills):
        kill_at_change(bench, job, at)


def test_a_search_killed_while_it_removes_the_previous_checkpoint_completes_when_repeated(bench) -> None:
    changes = bench.undisturbed("search").changes
    removals = [
        at
        for at, (event, path, *_) in enumerate(changes, 1)
        if event in ("os.remove", "os.rmdir") and path.startswith("run/checkpoints/step-")
    ]
    assert len(removals) >= 3
    for at in removals[-3:]:  # its two files, and its folder
        kill_at_change(bench, "search", at)


def test_a_comparison_killed_right_after_it_wrote_the_scores_keeps_their_provenance(bench) -> None:
    """The second call finds the scores and does not compute them again."""
    changes = bench.undisturbed("compare").changes
    renames = [at for at, (event, *paths) in enumerate(changes, 1) if event == "os.rename" and "/scores/" in paths[-1]]
    kill_at_change(bench, "compare", renames[0] + 2)  # after the rename, and after the sync of the folder


def kill_in_a_write(bench, job: str, size: int) -> int:
    """Kill the job in the middle of the write that makes a file larger than `size` bytes, and return its exit code."""
    bench.undisturbed(job)  # fills the token cache, so that the write is one into the folder
    folder = bench.folder(job)
    ended = bench.run(folder, [*JOBS[job][-1], "--quiet"], file_size_limit=size, kill_at_limit=True)
    assert ended.code in (KILLED_IN_A_WRITE, 0), ended.stderr
    bench.assert_repeating_completes(job, folder)
    return ended.code


@pytest.mark.parametrize(
    ("job", "size"),
    [("init-scores", 300), ("search", 600), ("search", 5000), ("widths", 9000), ("export", 20000), ("compare", 600)],
)
def test_a_job_killed_in_the_middle_of_a_write_completes_when_repeated(bench, job, size) -> None:
    assert kill_in_a_write(bench, job, size) == KILLED_IN_A_WRITE


def test_a_search_that_is_killed_again_and_again_finishes(bench) -> None:
    """Every call gets a few changes further than the checkpoint it starts from, and no further."""
    folder = bench.folder("search")
    fault = {"at": 60, "kind": "kill"}
    codes = [KILLED]
    while codes[-1] == KILLED and len(codes) < 30:
        codes.append(bench.run(folder, JOBS["search"][-1], fault=fault).code)
    assert codes[-1] == 0 and len(codes) > 3
    bench.assert_repeating_completes("search", folder)


def test_a_damaged_checkpoint_is_refused_and_skipped_on_request(bench) -> None:
    folder, command = bench.folder("search"), JOBS["search"][-1]
    changes = bench.undisturbed("search").changes
    renames = [at for at, change in enumerate(changes, 1) if change[-1] == "run/checkpoints/step-00000004"]
    assert bench.run(folder, command, fault={"at": renames[0] + 2, "kind": "kill"}).code == KILLED
    state = folder / "run/checkpoints/step-00000004/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    ended = bench.run(folder, [*command, "--quiet"])
    assert ended.code == 2
    assert ended.stderr.count("\n") == 1
    for fact in ("run/checkpoints/step-00000004: ", "state.safetensors", "step-00000003", "--skip-corrupt-checkpoint"):
        assert fact in ended.stderr
    assert bench.run(folder, [*command, "--skip-corrupt-checkpoint"]).code == 0
    assert contents_of(folder) == bench.undisturbed("search").contents


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_killed_at_any_change_to_the_disk_completes_when_repeated(bench, job) -> None:
    for at in range(1, len(bench.undisturbed(job).changes) + 1):
        kill_at_change(bench, job, at)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_a_job_killed_in_fifty_different_writes_completes_when_repeated(bench, job) -> None:
    sizes = random.Random(50)
    codes = [kill_in_a_write(bench, job, int(10 ** sizes.uniform(1, 4.5))) for _ in range(50)]
    assert codes.count(KILLED_IN_A_WRITE) > 10


# --- power cuts


def not_durable(changes: list[list[str]]) -> set[tuple[str, str]]:
    """Return what a power cut after these changes could lose: the bytes of a file, or its name in the folder.

    Fails if a file is renamed to its final name before its bytes are durable.
    """
    pending: set[tuple[str, str]] = set()

    def is_below(folder: str, path: str) -> bool:
        return Path(path).is_relative_to(folder)

    for event, path, *new_path in changes:
        if event == "open":
            pending |= {("bytes", path), ("name", path)}
        elif event == "os.mkdir":
            pending.add(("name", path))
        elif event == "fsync":
            pending.discard(("bytes", path))
            pending -= {(kind, name) for kind, name in pending if kind == "name" and str(Path(name).parent) == path}
        elif event == "os.remove":
            pending -= {("bytes", path), ("name", path)}
        elif event == "os.rmdir":  # fails if something is left inside, so it says nothing about files
            pending.discard(("name", path))
        elif event == "os.rename":
            moved = {(kind, name) for kind, name in pending if is_below(path, name)}
            assert moved <= {("name", path)}, f"{new_path[0]} got its name before these were durable: {moved}"
            pending = (pending - moved) | {("name", new_path[0])}
    return pending


@pytest.mark.parametrize("job", JOBS)
def test_everything_a_job_wrote_is_durable_when_it_ends(bench, job) -> None:
    outermost = {("name", name) for name in ("run", "small", "table")}  # syncs of their folder are not recorded
    assert not_durable(bench.undisturbed(job).changes) <= outermost


def test_the_durability_check_notices_a_missing_sync() -> None:
    write = [["open", "a/.x"], ["fsync", "a/.x"], ["os.rename", "a/.x", "a/x"], ["fsync", "a"]]
    assert not_durable(write) == set()
    assert not_durable(write[:-1]) == {("name", "a/x")}
    with pytest.raises(AssertionError, match="a/x got its name before"):
        not_durable([write[0], *write[2:]])
    assert not_durable([["open", "a/x"], ["os.rmdir", "a"]]) == {("bytes", "a/x"), ("name", "a/x")}
