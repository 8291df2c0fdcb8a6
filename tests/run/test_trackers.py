"""Trackers: what they are told is what the history says. TensorBoard's files are read back; the others are played."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from helpers.messages import refused
from helpers.trackers import scalars

from pgprune_cli.errors import UserError
from pgprune_cli.jobs.search import search
from pgprune_cli.run.history import Row, read_history
from pgprune_cli.run.trackers import MODULES, tracking
from pgprune_cli.run.training_history import TrainingRow

KEPT = {"attention": [4, 2], "ffn": [24, 6]}
ROWS = [
    Row(1, [3.0, 4.0], 3.5, 0.02, 9.0, 2.75, 0, 1000.0, 2_500_000_000, 10.0, KEPT),
    Row(2, [None, None], 3.5, None, 9.0, None, 2, 1000.0, 2_500_000_000, 20.0, None),
]


def test_a_row_is_told_by_the_names_of_the_history() -> None:
    assert ROWS[0].metrics() == {
        "loss": 3.5,
        "heldout_loss": 2.75,
        "baseline": 3.5,
        "learning_rate": 0.02,
        "entropy": 9.0,
        "skipped": 0,
        "tokens_per_second": 1000.0,
        "memory_bytes": 2_500_000_000,
        "seconds": 10.0,
        "kept/attention": 6,
        "kept/ffn": 30,
    }
    assert ROWS[1].metrics().keys() == {"baseline", "entropy", "skipped", "tokens_per_second", "memory_bytes"} | {
        "seconds"
    }


def test_a_row_of_a_recovery_is_told_by_the_names_of_its_history() -> None:
    row = TrainingRow(2, 2048, 1.5, None, None, 1e-3, 900.0, 10**9, 3.0)
    assert row.metrics() == {
        "tokens": 2048,
        "loss": 1.5,
        "learning_rate": 1e-3,
        "tokens_per_second": 900.0,
        "memory_bytes": 10**9,
        "seconds": 3.0,
    }


def test_a_search_tells_tensorboard_what_it_writes_down(small, tmp_path) -> None:
    pytest.importorskip("tensorboardX", reason="pgprune[tensorboard] is not installed")
    search(small(), tmp_path, tracker="tensorboard")
    told = scalars(tmp_path)
    rows = read_history(tmp_path)
    assert [row.step for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    for name in ("loss", "heldout_loss", "entropy", "kept/ffn"):
        written = {row.step: row.metrics()[name] for row in rows if name in row.metrics()}
        assert told[name] == pytest.approx(written, rel=1e-6)  # event files hold float32


def test_steps_that_come_again_replace_those_of_before(tmp_path) -> None:
    pytest.importorskip("tensorboardX", reason="pgprune[tensorboard] is not installed")
    with tracking("tensorboard", tmp_path, {}, 0) as track:
        for step in (1, 2, 3):
            track(Row(step, [3.0], None, None, 9.0, None, 0, 1.0, 1, 1.0, None))
    with tracking("tensorboard", tmp_path, {}, 1) as track:
        track(Row(2, [5.0], None, None, 9.0, None, 0, 1.0, 1, 1.0, None))
    assert scalars(tmp_path)["loss"] == {1: 3.0, 2: 5.0}


class Played:
    """A module of wandb's manner that notes what it is asked, and talks."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: dict | None = None
        self.told: list[tuple[int, dict]] = []
        self.finished = 0
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.init, module.log, module.finish = self.init, self.log, self.finish
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **options) -> Played:
        print("welcome")
        self.begun = options
        return self

    def log(self, metrics: dict, step: int) -> None:
        self.told.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_others_hear_the_same_and_keep_off_stdout(name, tmp_path, monkeypatch, capsys) -> None:
    played = Played(MODULES[name], monkeypatch)
    with pytest.raises(KeyboardInterrupt), tracking(name, tmp_path / "a run", {"seed": 3}, 0) as track:
        for row in ROWS:
            track(row)
        raise KeyboardInterrupt
    assert played.told == [(row.step, row.metrics()) for row in ROWS]
    assert (played.begun["project"], played.begun["name"]) == ("pgprune", "a run")
    assert played.begun["config"] == {"seed": 3}
    assert played.finished == 1
    assert capsys.readouterr().out == ""


def test_a_search_that_goes_on_is_the_same_run(finished, monkeypatch) -> None:
    wandb = Played("wandb", monkeypatch)
    identities = []
    for run, done in ((finished["units"], 0), (finished["units"], 3), (finished["widths"], 0)):
        with tracking("wandb", run, {}, done):
            identities.append(wandb.begun["id"])
    assert identities[0] == identities[1] != identities[2]
    trackio = Played("trackio", monkeypatch)
    for done, resume in ((0, "never"), (3, "allow")):
        with tracking("trackio", finished["units"], {}, done):
            assert trackio.begun["resume"] == resume


@pytest.mark.parametrize("name", MODULES)
def test_a_tracker_that_is_missing_is_named_before_the_model_is_loaded(name, small, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with refused(f"--tracker {name}", MODULES[name], f"pip install 'pgprune[{name}]'"):
        search(small("model=nowhere"), tmp_path, tracker=name)


def test_a_tracker_that_will_not_begin_says_why(tmp_path, monkeypatch) -> None:
    played = Played("wandb", monkeypatch)

    def refuse(**_: object) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with (
        pytest.raises(UserError, match=r"^--tracker wandb: no API key configured$"),
        tracking("wandb", tmp_path, {}, 0),
    ):
        pass
    assert played.finished == 0
