"""kill -9 at any moment: the same command afterwards ends as if nothing had been. And after a power cut it could."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers.faults_bench import JOBS, outcome

KILLED = -9


def killed_at_a_change(bench, job: str, at: int) -> None:
    folder = bench.folder(job)
    ended = bench.run(folder, JOBS[job][-1], fault={"at": at, "kind": "kill"})
    assert ended.code == KILLED, ended.said
    bench.ends_as_if_undisturbed(job, folder)


@pytest.mark.parametrize(
    ("job", "kills"), [("init-scores", 2), ("search", 6), ("widths", 3), ("export", 4), ("compare", 3)]
)
def test_a_kill_at_a_change_to_the_disk_costs_nothing(bench, job, kills) -> None:
    points = range(1, len(bench.of(job).points) + 1)
    for at in random.Random(job).sample(points, kills):
        killed_at_a_change(bench, job, at)


def test_a_kill_while_the_last_old_checkpoint_goes_leaves_nothing_of_it(bench) -> None:
    points = bench.of("search").points
    removals = [
        at
        for at, (event, path, *_) in enumerate(points, 1)
        if event in ("os.remove", "os.rmdir") and path.startswith("run/checkpoints/step-")
    ]
    for at in removals[-3:]:  # of its two files, and of its directory
        killed_at_a_change(bench, "search", at)


def test_a_kill_as_soon_as_a_comparison_has_scores_forgets_no_provenance(bench) -> None:
    """They are found then, and not made again."""
    points = bench.of("compare").points
    named = [at for at, (event, *paths) in enumerate(points, 1) if event == "os.rename" and "/scores/" in paths[-1]]
    killed_at_a_change(bench, "compare", named[0] + 2)  # after its name, and the sync of its folder


def killed_at_an_instant(bench, job: str, fraction: float) -> None:
    folder = bench.folder(job)
    ended = bench.run(folder, JOBS[job][-1], kill_after=fraction * bench.of(job).seconds)
    assert ended.code in (KILLED, 0), ended.said
    bench.ends_as_if_undisturbed(job, folder)


@pytest.mark.parametrize("job", JOBS)
def test_a_kill_at_an_instant_costs_nothing(bench, job) -> None:
    killed_at_an_instant(bench, job, random.Random(job).random())


def test_a_search_that_is_killed_again_and_again_gets_there(bench) -> None:
    """Every call gets a few changes further than the checkpoint it begins with, and no further."""
    folder = bench.folder("search")
    fault = {"at": 60, "kind": "kill"}
    codes = [KILLED]
    while codes[-1] == KILLED and len(codes) < 30:
        codes.append(bench.run(folder, JOBS["search"][-1], fault=fault).code)
    assert codes[-1] == 0 and len(codes) > 3
    bench.ends_as_if_undisturbed("search", folder)


def test_a_damaged_checkpoint_is_refused_and_skipped_when_told_so(bench) -> None:
    folder, command = bench.folder("search"), JOBS["search"][-1]
    points = bench.of("search").points
    named = [at for at, point in enumerate(points, 1) if point[-1] == "run/checkpoints/step-00000004"]
    assert bench.run(folder, command, fault={"at": named[0] + 2, "kind": "kill"}).code == KILLED
    newest = folder / "run/checkpoints/step-00000004"
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-1])
    ended = bench.run(folder, [*command, "--quiet"])
    assert ended.code == 2
    assert ended.said.startswith("pgprune: run/checkpoints/step-00000004: damaged checkpoint: ")
    assert ended.said.endswith("go on from step-00000003, or search with --skip-corrupt-checkpoint\n")
    assert bench.run(folder, [*command, "--skip-corrupt-checkpoint"]).code == 0
    assert outcome(folder) == bench.of("search").left


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_a_kill_at_every_change_to_the_disk(bench, job) -> None:
    for at in range(1, len(bench.of(job).points) + 1):
        killed_at_a_change(bench, job, at)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_kills_at_fifty_instants(bench, job) -> None:
    chance = random.Random(50)
    for _ in range(50):
        killed_at_an_instant(bench, job, chance.random())


# --- power cuts


def not_durable(points: list[list[str]]) -> set[tuple[str, str]]:
    """What a power cut after these changes could take: the bytes of a file, or the entry of a name in its folder.

    Asserts that no file gets its name before its bytes are safe.
    """
    pending: set[tuple[str, str]] = set()

    def below(path: str, other: str) -> bool:
        return Path(other).is_relative_to(path)

    for event, path, *to in points:
        if event == "open":
            pending |= {("bytes", path), ("name", path)}
        elif event == "os.mkdir":
            pending.add(("name", path))
        elif event == "fsync":
            pending.discard(("bytes", path))
            pending -= {(kind, name) for kind, name in pending if kind == "name" and str(Path(name).parent) == path}
        elif event in ("os.remove", "os.rmdir"):
            pending = {(kind, name) for kind, name in pending if not below(path, name)}
        elif event == "os.rename":
            moved = {(kind, name) for kind, name in pending if below(path, name)}
            assert moved <= {("name", path)}, f"{to[0]} got its name before these were safe: {moved}"
            pending = (pending - moved) | {("name", to[0])}
    return pending


@pytest.mark.parametrize("job", JOBS)
def test_what_is_done_is_durable(bench, job) -> None:
    top = {("name", name) for name in ("run", "small", "table")}  # their folder is outside of what is watched
    assert not_durable(bench.of(job).points) <= top


def test_a_missing_sync_would_be_noticed() -> None:
    write = [["open", "a/.x"], ["fsync", "a/.x"], ["os.rename", "a/.x", "a/x"], ["fsync", "a"]]
    assert not_durable(write) == set()
    assert not_durable(write[:-1]) == {("name", "a/x")}
    with pytest.raises(AssertionError, match="a/x got its name before"):
        not_durable([write[0], *write[2:]])
