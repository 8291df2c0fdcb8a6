"""A checkpoint is read back exactly, or refused with advice. It is never written partially."""

import json
import os
import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers.messages import says
from safetensors.torch import load, save

from pgprune_cli.core.space import Family, MaskSpace
from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState, begin, propose, update
from pgprune_cli.errors import UserError
from pgprune_cli.run.checkpoint import Best, Checkpoint, latest_checkpoint, save_checkpoint
from pgprune_cli.run.layout import CHECKPOINT_RECORD, CHECKPOINT_TENSORS, CHECKPOINTS_FOLDER
from pgprune_cli.storage.records import read_json, write_record
from pgprune_cli.storage.rows import Written

HISTORY = Written(77, "of these bytes")


def a_checkpoint(step: int = 3) -> Checkpoint:
    """Return a checkpoint with floats that need full precision and a generator in use."""
    generator = torch.Generator().manual_seed(step)
    theta = torch.rand(50, generator=generator, dtype=torch.float64)
    theta[:3] = torch.tensor([0.0, 1.0, 5e-324], dtype=torch.float64)
    state = SearchState(theta, 1 / 3 + step, step, 2, generator.get_state())
    return Checkpoint(state, Best(step - 1, 1 / 7, theta / 3), 1, 1.1, HISTORY, "an identity")


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert left.state.theta.dtype == right.state.theta.dtype == torch.float64
    assert left.state.theta.numpy().tobytes() == right.state.theta.numpy().tobytes()
    assert left.best.centre.dtype == right.best.centre.dtype == torch.float64
    assert left.best.centre.numpy().tobytes() == right.best.centre.numpy().tobytes()
    assert left.state.rng.dtype == torch.uint8 and left.state.rng.equal(right.state.rng)
    nothing = torch.empty(0)
    plain_one, plain_other = (
        replace(x, state=replace(x.state, theta=nothing, rng=nothing), best=replace(x.best, centre=nothing))
        for x in (left, right)
    )
    assert repr(plain_one) == repr(plain_other)  # repr: 1 and 1.0 differ, and every bit of a float shows


def folders(run: Path) -> list[str]:
    return (
        sorted(path.name for path in (run / CHECKPOINTS_FOLDER).iterdir())
        if (run / CHECKPOINTS_FOLDER).exists()
        else []
    )


def refused(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        latest_checkpoint(run)
    return str(caught.value)


# --- round trip


@pytest.mark.parametrize("baseline", [None, 0.1 + 0.2])
def test_checkpoint_is_read_back_exactly(tmp_path, baseline):
    checkpoint = a_checkpoint()
    checkpoint = replace(checkpoint, state=replace(checkpoint.state, baseline=baseline))
    target = save_checkpoint(tmp_path, checkpoint)
    assert target == tmp_path / CHECKPOINTS_FOLDER / "step-00000003"
    loaded = latest_checkpoint(tmp_path)
    assert_same(loaded, checkpoint)


SPACE = MaskSpace((Family("attention", (3, 3), (8, 8)), Family("ffn", (7, 5), (3, 3))))


def a_step(state: WidthState) -> WidthState:
    """Return a checkpoint of a width search in which one of four losses is not finite."""
    state, offsets = propose(state, 4, SPACE)
    losses = offsets.exp().sum(1) + state.step / 3
    losses[state.step % 4] = float("nan")
    return update(state, (-offsets).exp(), losses, SPACE)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_checkpoint_of_a_width_search_resumes_bit_for_bit(tmp_path, steps):
    state = begin(SPACE, 7)
    for _ in range(steps):
        state = a_step(state)
    best = None if steps == 1 else Best(steps, 0.1, state.mean)
    checkpoint = Checkpoint(state, best, 1, 1.1, HISTORY, "an identity")
    save_checkpoint(tmp_path, checkpoint)
    loaded = latest_checkpoint(tmp_path)
    assert replace(loaded, state=None, best=None) == replace(checkpoint, state=None, best=None)
    if checkpoint.best is None:
        assert loaded.best is None
    else:
        assert (loaded.best.step, loaded.best.objective) == (steps, 0.1)
        assert torch.equal(loaded.best.centre, checkpoint.best.centre)
    for left, right in ((loaded.state, state), (a_step(loaded.state), a_step(state))):
        assert isinstance(left, WidthState)
        for entry in fields(WidthState):
            got, expected = getattr(left, entry.name), getattr(right, entry.name)
            if isinstance(expected, torch.Tensor):
                assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
                assert got.numpy().tobytes() == expected.numpy().tobytes()
            else:
                assert got == expected


def test_checkpoint_restores_the_state_of_the_generator(tmp_path):
    generator = torch.Generator().manual_seed(1)
    torch.rand(7, generator=generator)
    checkpoint = a_checkpoint()
    save_checkpoint(tmp_path, replace(checkpoint, state=replace(checkpoint.state, rng=generator.get_state())))
    again = torch.Generator()
    again.set_state(latest_checkpoint(tmp_path).state.rng)
    assert torch.rand(100, generator=again).equal(torch.rand(100, generator=generator))


def test_latest_checkpoint_is_none_without_checkpoints(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / CHECKPOINTS_FOLDER).mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_save_keeps_the_last_two_checkpoints(tmp_path):
    for step, kept in ((9, [9]), (10, [9, 10]), (11, [10, 11]), (100, [11, 100])):
        save_checkpoint(tmp_path, a_checkpoint(step))
        assert folders(tmp_path) == [f"step-{step:08d}" for step in kept]
        assert latest_checkpoint(tmp_path).state.step == step


def test_save_does_not_change_a_step_that_is_already_saved(tmp_path):
    first = a_checkpoint()
    save_checkpoint(tmp_path, first)
    assert save_checkpoint(tmp_path, replace(first, seconds=99.0)) == tmp_path / CHECKPOINTS_FOLDER / "step-00000003"
    assert_same(latest_checkpoint(tmp_path), first)
    assert folders(tmp_path) == ["step-00000003"]


def test_checkpoint_contains_no_pickle(tmp_path, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint must not be able to run code")

    for module, name in ((pickle, "dumps"), (pickle, "dump"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(torch, "save", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    save_checkpoint(tmp_path, a_checkpoint())
    assert_same(latest_checkpoint(tmp_path), a_checkpoint())
    folder = tmp_path / CHECKPOINTS_FOLDER / "step-00000003"
    assert folders(tmp_path) == [folder.name] and sorted(path.name for path in folder.iterdir()) == [
        CHECKPOINT_RECORD,
        CHECKPOINT_TENSORS,
    ]
    assert load((folder / CHECKPOINT_TENSORS).read_bytes()).keys() == {"theta", "rng", "best_centre"}
    json.loads((folder / CHECKPOINT_RECORD).read_text())


# --- damage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, a_checkpoint(3))
    save_checkpoint(tmp_path, a_checkpoint(6))
    return tmp_path


def edited(folder: Path, **changes: object) -> None:
    """Change keys of the record. A key with the value None is removed."""
    record = json.loads((folder / CHECKPOINT_RECORD).read_text()) | changes
    (folder / CHECKPOINT_RECORD).write_text(
        json.dumps({key: value for key, value in record.items() if value is not None})
    )


def resealed(folder: Path, **changes: object) -> None:
    """Change keys of the record and write it with a matching checksum."""
    edited(folder, **changes)
    write_record(folder / CHECKPOINT_RECORD, read_json(folder / CHECKPOINT_RECORD))


def truncate(folder: Path) -> None:
    os.truncate(folder / CHECKPOINT_TENSORS, (folder / CHECKPOINT_TENSORS).stat().st_size - 8)


def flip(folder: Path) -> None:
    content = bytearray((folder / CHECKPOINT_TENSORS).read_bytes())
    content[-100] ^= 1
    (folder / CHECKPOINT_TENSORS).write_bytes(content)


def swap(folder: Path) -> None:
    """Replace the tensors by the intact ones of another step."""
    (folder / CHECKPOINT_TENSORS).write_bytes((folder.parent / "step-00000003" / CHECKPOINT_TENSORS).read_bytes())


def swap_whole(folder: Path) -> None:
    """Replace all files by the intact ones of another step."""
    for name in (CHECKPOINT_TENSORS, CHECKPOINT_RECORD):
        (folder / name).write_bytes((folder.parent / "step-00000003" / name).read_bytes())


def without_theta(folder: Path) -> None:
    from pgprune_cli.storage.records import checksum

    (folder / CHECKPOINT_TENSORS).write_bytes(save({"rng": torch.zeros(3, dtype=torch.uint8)}))
    edited(folder, state_sha256=checksum(folder / CHECKPOINT_TENSORS))


DAMAGE = {
    "truncated": (truncate, "state.safetensors is missing or does not match its checksum"),
    "bit flip": (flip, "state.safetensors is missing or does not match its checksum"),
    "swapped": (swap, "state.safetensors is missing or does not match its checksum"),
    "swapped whole": (swap_whole, f"{CHECKPOINT_RECORD} belongs to step-00000003"),
    "no tensors": (
        lambda folder: (folder / CHECKPOINT_TENSORS).unlink(),
        "state.safetensors is missing or does not match its checksum",
    ),
    "no record": (lambda folder: (folder / CHECKPOINT_RECORD).unlink(), f"{CHECKPOINT_RECORD}: cannot be read"),
    "not json": (lambda folder: (folder / CHECKPOINT_RECORD).write_text("{"), f"{CHECKPOINT_RECORD}: cannot be read"),
    "not an object": (
        lambda folder: (folder / CHECKPOINT_RECORD).write_text("[]"),
        f"{CHECKPOINT_RECORD}: expected a JSON object, got a list",
    ),
    "version": (
        lambda folder: edited(folder, version=4),
        f"{CHECKPOINT_RECORD}: damaged: it does not match its checksum",
    ),
    "no version": (lambda folder: resealed(folder, version=None), "'version' is missing"),
    "edited": (
        lambda folder: edited(folder, bad_steps=11),
        f"{CHECKPOINT_RECORD}: damaged: it does not match its checksum",
    ),
    "missing key": (
        lambda folder: edited(folder, bad_steps=None),
        f"{CHECKPOINT_RECORD}: damaged: it does not match its checksum",
    ),
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], f"{CHECKPOINT_RECORD}: cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_with_advice(run, damage):
    harm, words = DAMAGE[damage]
    harm(run / CHECKPOINTS_FOLDER / "step-00000006")
    message = refused(run)
    says(
        message, f"{run / CHECKPOINTS_FOLDER / 'step-00000006'}: ", words, "step-00000003", "--skip-corrupt-checkpoint"
    )
    assert "\n" not in message


@pytest.mark.parametrize("damage", DAMAGE)
def test_search_resumes_when_the_advice_is_followed(run, damage):
    import shutil

    DAMAGE[damage][0](run / CHECKPOINTS_FOLDER / "step-00000006")
    shutil.rmtree(run / CHECKPOINTS_FOLDER / "step-00000006")
    assert_same(latest_checkpoint(run), a_checkpoint(3))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped_when_requested(run, damage):
    DAMAGE[damage][0](run / CHECKPOINTS_FOLDER / "step-00000006")
    for _ in range(2):  # the second time it finds nothing to skip
        assert_same(latest_checkpoint(run, skip_corrupt_checkpoint=True), a_checkpoint(3))
        assert folders(run) == ["step-00000003"]
    save_checkpoint(run, a_checkpoint(6))
    assert_same(latest_checkpoint(run), a_checkpoint(6))


def test_intact_checkpoint_is_never_skipped(run):
    assert_same(latest_checkpoint(run, skip_corrupt_checkpoint=True), a_checkpoint(6))
    assert folders(run) == ["step-00000003", "step-00000006"]


def test_no_checkpoint_is_removed_when_both_are_damaged(run):
    for name in ("step-00000003", "step-00000006"):
        truncate(run / CHECKPOINTS_FOLDER / name)
    with pytest.raises(UserError, match=r"step-00000003: .*start the search over"):
        latest_checkpoint(run, skip_corrupt_checkpoint=True)
    assert folders(run) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("skip", [False, True])
def test_checkpoint_of_another_version_is_refused_and_never_skipped(run, version, skip):
    newest = run / CHECKPOINTS_FOLDER / "step-00000006"
    resealed(newest, version=version)
    with pytest.raises(UserError) as caught:
        latest_checkpoint(run, skip_corrupt_checkpoint=skip)
    says(str(caught.value), f"{newest}: ", f"version {version}", "--out")
    assert len(folders(run)) == 2


def test_advice_is_to_start_over_when_there_is_no_older_checkpoint(tmp_path):
    save_checkpoint(tmp_path, a_checkpoint(6))
    truncate(tmp_path / CHECKPOINTS_FOLDER / "step-00000006")
    says(
        refused(tmp_path),
        f"{tmp_path / CHECKPOINTS_FOLDER / 'step-00000006'}: ",
        CHECKPOINT_TENSORS,
        "start the search over",
    )


def test_checkpoint_is_refused_when_a_tensor_is_missing(run):
    folder = run / CHECKPOINTS_FOLDER / "step-00000006"
    without_theta(folder)
    resealed(folder)
    says(refused(run), f"{folder}: ", "'theta'", "step-00000003")


def test_checkpoint_is_refused_when_any_bit_of_the_record_flips(run):
    """This includes flips that leave valid JSON, such as a changed digit."""
    path = run / CHECKPOINTS_FOLDER / "step-00000006" / CHECKPOINT_RECORD
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        for bit in (1, 16):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            try:
                loaded = latest_checkpoint(run)
            except UserError:
                noticed += 1
            else:  # such as 0.30000000000000004 → 0.30000000000000005, the same float
                assert_same(loaded, a_checkpoint(6))
    assert noticed > 1.9 * len(whole)


# --- writes that fail


def test_full_disk_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    old, new = a_checkpoint(3), a_checkpoint(6)
    fsync = os.fsync
    outcomes = []
    for moment in range(20):
        run = tmp_path / str(moment)
        save_checkpoint(run, old)
        left = moment

        def failing(handle: int) -> None:
            nonlocal left
            if left == 0:
                raise OSError(28, "No space left on device")
            left -= 1
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                save_checkpoint(run, new)
                outcomes.append("written")
            except OSError:
                outcomes.append("failed")
        found = latest_checkpoint(run)
        assert_same(found, old if found.state.step == 3 else new)
        assert folders(run) in (["step-00000003"], ["step-00000003", "step-00000006"])
        assert outcomes[-1] == "failed" or found.state.step == 6
        if outcomes[-1] == "written":
            break
    assert outcomes.count("failed") >= 4 and outcomes[-1] == "written"


@pytest.mark.parametrize("name", ["save", "write_record", "checksum"])
def test_failed_save_leaves_no_partial_checkpoint(tmp_path, monkeypatch, name):
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(f"pgprune_cli.run.checkpoint.{name}", failing)
        with pytest.raises(OSError, match="Input/output error"):
            save_checkpoint(tmp_path, a_checkpoint())
    assert folders(tmp_path) == []
    assert latest_checkpoint(tmp_path) is None


def test_save_refuses_a_state_that_is_not_finite(tmp_path):
    checkpoint = a_checkpoint()
    with pytest.raises(ValueError, match="JSON compliant"):
        save_checkpoint(tmp_path, replace(checkpoint, state=replace(checkpoint.state, baseline=float("nan"))))
    assert folders(tmp_path) == []


def test_leftover_of_a_killed_process_is_ignored(tmp_path):
    """In containers, a later process often has the same id."""
    left = tmp_path / CHECKPOINTS_FOLDER / f".step-00000003.{os.getpid()}.tmp"
    left.mkdir(parents=True)
    (left / CHECKPOINT_TENSORS).write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, a_checkpoint())
    assert_same(latest_checkpoint(tmp_path), a_checkpoint())
    assert folders(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("key", ["history_sha256", "sha256"])
def test_checkpoint_is_refused_without_a_checksum(run, key):
    folder = run / CHECKPOINTS_FOLDER / "step-00000006"
    (resealed if key == "history_sha256" else edited)(folder, **{key: None})
    says(refused(run), f"{folder}: ", "step-00000003")
