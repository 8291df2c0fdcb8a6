"""The training of a recovery: its loss falls, and a stopped one goes on bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.models import VOCABULARY, tiny_model

pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")

from pgprune_cli.errors import RunError
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.recover import trainer
from pgprune_cli.recover.checkpoints import TRAINED, TrainingCheckpoint, best, finish, latest
from pgprune_cli.recover.schedule import Schedule
from pgprune_cli.recover.student import trainable, trained_tensors
from pgprune_cli.recover.teacher import LiveTeacher, Teacher
from pgprune_cli.recover.teacher_cache import CacheKey
from pgprune_cli.recover.teacher_writing import cached_teacher
from pgprune_cli.recover.texts import RecoveryText
from pgprune_cli.recover.trainer import Training
from pgprune_cli.recover.training import load_trained, train, training_arguments
from pgprune_cli.run.checkpoint import CorruptCheckpoint
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import TRAINING_HISTORY
from pgprune_cli.run.training_history import TrainingRow, read_training_history
from pgprune_cli.storage.rows import Written, cut_back

SETTINGS = RecoverSettings(tokens=8 * 4 * 16, seqlen=16, batch=4, heldout=4, learning_rate=1e-2, checkpoint_every=3)
"""8 steps of 4 windows of 16 tokens."""

pytestmark = pytest.mark.usefixtures("one_thread")


def text(trained: torch.Tensor | None = None) -> RecoveryText:
    windows = torch.randint(VOCABULARY, (14, 16), generator=torch.Generator().manual_seed(1))
    return RecoveryText.of(windows, 4, trained)


def recover(
    run: Path,
    settings: RecoverSettings = SETTINGS,
    *,
    resume: bool = False,
    skip: bool = False,
    stop: tuple[int, int] | None = None,
    bfloat16: bool = False,
    architecture: str = "llama-gqa",
    trained: torch.Tensor | None = None,
    teacher: Teacher | None = None,
) -> dict[str, torch.Tensor]:
    """Train a tiny model towards another one, and return what was trained. stop: (step, signal) to be sent there."""
    run.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = PrunableModel.of(tiny_model(architecture, seed=1))
    student = trainable(model, settings.train, settings.lora_rank)
    schedule = Schedule.of(settings, 1)
    checkpoint = latest(run, skip) if resume else None
    if checkpoint is not None:
        load_trained(student, checkpoint)
    cut_back(run / TRAINING_HISTORY, None if checkpoint is None else checkpoint.history)

    def report(row: TrainingRow) -> None:
        if stop is not None and row.step == stop[0]:
            os.kill(os.getpid(), stop[1])

    hidden = range(4) if settings.hidden else ()
    training = Training(
        run,
        settings,
        0,
        schedule,
        text(trained),
        teacher or LiveTeacher(tiny_model(architecture), settings.top_k, settings.temperature, hidden),
        [model.layers[layer] for layer in hidden],
        checkpoint,
        report,
        bfloat16=bfloat16,
    )
    train(student, training_arguments(run, settings, 0, schedule, on_cpu=True), training)
    return trained_tensors(student)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The run directory of a training that nothing stopped, and its weights."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, recover(run)


def test_training_lowers_the_divergence_on_heldout_text(whole) -> None:
    rows = read_training_history(whole[0])
    assert [row.step for row in rows] == list(range(9))
    assert {row.step for row in rows if row.heldout_divergence is not None} == {0, 3, 6, 8}
    assert rows[-1].heldout_divergence < 0.9 * rows[0].heldout_divergence
    assert rows[-1].tokens == SETTINGS.tokens
    assert rows[3].loss == pytest.approx(rows[3].divergence)


def test_training_towards_cached_predictions_equals_that_towards_the_live_model(tmp_path: Path) -> None:
    """For one reading of the text. Later ones begin elsewhere, if the dense model can be asked."""
    settings = replace(SETTINGS, top_k=24, tokens=5 * 2 * 16, batch=2)
    key = CacheKey.of("dense", text(), VOCABULARY, settings.top_k, settings.temperature)
    live = LiveTeacher(tiny_model("llama-gqa"), settings.top_k, settings.temperature)
    cached = cached_teacher(tmp_path / "cache", key, text(), lambda: live, batch=4)
    losses = []
    for name, teacher in {"live": live, "cached": cached}.items():
        recover(tmp_path / name, settings, teacher=teacher)
        losses.append([row.loss for row in read_training_history(tmp_path / name) if row.loss is not None])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("step", "signum"), [(4, signal.SIGTERM), (6, signal.SIGINT)])
def test_stopped_training_resumes_bit_for_bit(whole, tmp_path: Path, step: int, signum: int) -> None:
    with pytest.raises(Interrupted) as stopped:
        recover(tmp_path / "run", stop=(step, signum))
    assert (stopped.value.signum, stopped.value.step) == (signum, step + 1)
    assert_equal(recover(tmp_path / "run", resume=True), whole[1])
    keys = ("step", "tokens", "loss", "divergence", "heldout_divergence", "learning_rate")
    found, expected = (
        [[getattr(row, key) for key in keys] for row in read_training_history(run)]
        for run in (tmp_path / "run", whole[0])
    )
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "bfloat16"),
    [
        (replace(SETTINGS, train="lora", lora_rank=2), False),
        (replace(SETTINGS, train="norms-and-outputs", accumulate=2, batch=2), True),
    ],
    ids=["lora", "norms-and-outputs in bfloat16"],
)
def test_every_kind_of_training_resumes_bit_for_bit(tmp_path: Path, settings: RecoverSettings, bfloat16: bool) -> None:
    expected = recover(tmp_path / "whole", settings, bfloat16=bfloat16)
    rows = read_training_history(tmp_path / "whole")
    assert rows[-1].heldout_divergence < rows[0].heldout_divergence
    with pytest.raises(Interrupted):
        recover(tmp_path / "run", settings, stop=(4, signal.SIGINT), bfloat16=bfloat16)
    assert_equal(recover(tmp_path / "run", settings, resume=True, bfloat16=bfloat16), expected)


def test_no_float32_tensor_of_all_logits_is_made_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def divergences(logits: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(logits.dtype)
        return original(logits, *others)

    original = trainer.divergences
    monkeypatch.setattr(trainer, "divergences", divergences)
    recover(tmp_path / "run", replace(SETTINGS, tokens=4 * 16), bfloat16=True)
    assert set(seen) == {torch.bfloat16}


def test_only_norms_and_outputs_are_trained(tmp_path: Path) -> None:
    trained = recover(tmp_path / "run", replace(SETTINGS, train="norms-and-outputs"))
    before = tiny_model("llama-gqa", seed=1).state_dict()
    assert all(not torch.equal(weight, before[name]) for name, weight in trained.items())
    assert {name.split(".")[-2] for name in trained} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "o_proj",
        "down_proj",
    }


def test_accumulation_and_activation_checkpointing_give_the_same_weights(tmp_path: Path) -> None:
    masked = torch.rand(14, 16, generator=torch.Generator().manual_seed(2)) < 0.3
    losses = {"hidden": 0.5, "lm": 0.5, "top_k": 7, "temperature": 2.0}
    settings = replace(SETTINGS, tokens=3 * 4 * 16, **losses)
    expected = recover(tmp_path / "one", settings, trained=masked)
    for name, other in {"batches": {"batch": 1, "accumulate": 4}, "again": {"gradient_checkpointing": True}}.items():
        found = recover(tmp_path / name, replace(settings, **other), trained=masked)
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-3)
        rows = [read_training_history(tmp_path / run) for run in ("one", name)]
        assert [row.loss for row in rows[0][1:]] == pytest.approx([row.loss for row in rows[1][1:]], rel=1e-3)
        assert all(row.loss > row.divergence for row in rows[0][1:])


def test_training_stops_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    with refused("step ", "not finite", "recover.learning_rate", error=RunError):
        recover(tmp_path / "run", replace(SETTINGS, learning_rate=1e30))
    assert latest(tmp_path / "run") is None
    with refused("step 2", "not finite", error=RunError):  # the held-out text is read before the next loss
        recover(tmp_path / "other", replace(SETTINGS, learning_rate=1e37, checkpoint_every=1))


@pytest.fixture
def stopped(tmp_path: Path, whole) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def test_a_recovery_keeps_its_last_two_checkpoints_and_the_best(whole) -> None:
    names = sorted(folder.name for folder in (whole[0] / "checkpoints").iterdir())
    assert names == ["checkpoint-6", "checkpoint-8"]
    chosen = best(whole[0])
    rows = [row for row in read_training_history(whole[0]) if row.heldout_divergence is not None]
    assert chosen.heldout_divergence == min(row.heldout_divergence for row in rows)
    assert not list(whole[0].rglob("training_args.bin"))


def test_best_checkpoint_is_kept_however_old_it_is(tmp_path: Path) -> None:
    for step, divergence in ((2, 0.9), (4, 0.5), (6, None), (8, 0.8), (10, 0.7)):
        folder = tmp_path / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / TRAINED).write_bytes(b"weights")
        finish(TrainingCheckpoint(folder, divergence, 1.0, Written(0, "")))
    assert best(tmp_path).step == 4
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize("name", [TRAINED, "optimizer.pt", "rng_state.pth", "state.json"])
def test_damaged_checkpoint_is_refused_and_can_be_skipped(whole, stopped: Path, name: str) -> None:
    path = stopped / "checkpoints/checkpoint-8" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with refused("checkpoint-8", "corrupt", name, "checkpoint-6", "--skip-corrupt-checkpoint", error=CorruptCheckpoint):
        recover(stopped, resume=True)
    assert_equal(recover(stopped, resume=True, skip=True), whole[1])


def test_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if (child := os.fork()) == 0:
        count = 0

        def save(*_: object) -> None:
            nonlocal count
            count += 1
            if count == 5:  # three files of the first checkpoint, then the optimizer of the second
                os.kill(os.getpid(), signal.SIGKILL)
            original(*_)

        original, torch.save = torch.save, save
        with suppress(BaseException):
            recover(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert latest(run).step == 3
    assert_equal(recover(run, resume=True), whole[1])
