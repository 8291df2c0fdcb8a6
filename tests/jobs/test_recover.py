"""The recovery of exported models, from the command to the recovered model."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.exports import DECISIONS, export
from helpers.killed import killed_at
from helpers.masks import draw
from helpers.messages import refused, says
from helpers.models import save_tokenizer, tiny_model
from helpers.trackers import scalars
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")

from pgprune_cli.api import recover as recover_from_python
from pgprune_cli.cli import program
from pgprune_cli.console.progress import SILENT, StderrProgress
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError
from pgprune_cli.jobs import recover as job
from pgprune_cli.jobs import recovery_disk, recovery_request
from pgprune_cli.jobs.recover import recover
from pgprune_cli.jobs.recovery_request import Request, open_request, recipe_of
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.loading import load_model, load_tokenizer, read_config
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recover import teacher
from pgprune_cli.recover.loss import divergences
from pgprune_cli.recover.student import trained_parameters
from pgprune_cli.recover.teacher import LiveTeacher
from pgprune_cli.recover.texts import recovery_text
from pgprune_cli.recover.trainer import RecoveryTrainer
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import (
    CHECKPOINT_RECORD,
    CHECKPOINTS_FOLDER,
    LOCK_FILE,
    RECOVERY_RECORD,
    TEACHER_FOLDER,
    TRAINING_RECORD,
    WRITING_RECORD,
)
from pgprune_cli.run.training_history import TrainingRow, read_training_history
from pgprune_cli.storage.records import read_record, write_record

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "recover.tokens=1024",
    "recover.seqlen=16",
    "recover.batch=8",
    "recover.heldout=4",
    "recover.learning_rate=0.01",
    "dtype=float32",
    "device=cpu",
)
"""8 steps of 8 windows of 16 tokens."""


def pruned(folder: Path, architecture: str, decision: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model, a text, and the export of a decision on the model. Return the export's directory."""
    model = tiny_model(architecture).to(dtype)
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    (folder / "text.txt").write_text("The king was glad, and the queen was not. " * 60)
    export(folder / "base", folder / "small", draw(model, DECISIONS[decision]))
    return folder / "small"


def recipe(folder: Path, *overrides: str) -> Recipe:
    texts = (f"calibration.corpus={folder / 'text.txt'}", f"model={folder / 'base'}")
    return load(find("demo"), [*SMALL, *texts, *overrides])


def request(folder: Path, *overrides: str, name: str = "better", **options: Any) -> Request:
    """Return a request that recovers the export in `folder` into the model and the run of this name."""
    model, out, run = str(folder / "small"), folder / name, folder / f"runs/{name}"
    return Request(model, out, run, recipe(folder, *overrides), **options)


def recovery_of(directory: Path) -> dict[str, Any]:
    """Return the record of the recovery of a model or a run."""
    return read_record(directory / RECOVERY_RECORD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, token_cache: str) -> Path:
    """A folder with a tiny pruned model, its base and a text, and its recovery: the model `better`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recover")
    pruned(folder, "llama-gqa", "no heads in the first layer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", token_cache)
        recover(request(folder))
    return folder


@pytest.mark.parametrize(
    ("architecture", "decision", "overrides"),
    [
        ("gemma2", "two layers removed, among them the first", ("recover.hidden=0.2",)),
        ("qwen3_5_text", "mixed sizes", ("recover.train=norms-and-outputs", "recover.lm=0.1")),
        ("mixtral", "two layers without heads, two without channels", ("recover.top_k=8", "recover.teacher=cached")),
        ("phi3", "mixed sizes", ("recover.train=lora", "recover.lora_rank=4", "recover.gradient_checkpointing=true")),
    ],
)
def test_recovery_writes_the_best_weights_of_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, decision: str, overrides: tuple[str, ...]
) -> None:
    pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    for module in (recovery_request, teacher):  # the same numbers on every machine
        monkeypatch.setattr(module, "fastest_dtype", lambda device: "float32")
    pruned(tmp_path, architecture, decision)
    asked = request(tmp_path, *overrides)
    record = recover(asked)
    assert record["loss_after"] < record["loss_before"]
    assert not verify(tmp_path / "better").faults
    assert heldout_divergence(asked, "small") == pytest.approx(record["loss_before"], rel=1e-3)
    assert heldout_divergence(asked, "better") == pytest.approx(record["loss_after"], rel=1e-3)
    assert {path.name for path in asked.run.iterdir()} - {TEACHER_FOLDER} == {
        "recipe.yaml",
        "training.json",
        "training.jsonl",
        "provenance.jsonl",
        "recovery.json",
    }
    assert (asked.run / TEACHER_FOLDER).exists() == ("recover.teacher=cached" in overrides)


@torch.no_grad()
def heldout_divergence(asked: Request, name: str) -> float:
    """Return the divergence of a model in the folder of the request from its base on the held-out windows."""
    source, settings = resolve(str(asked.out.with_name(name))), asked.recipe.recover
    text = recovery_text(asked.recipe, name, read_config(source), load_tokenizer(source))
    rows = torch.arange(len(text.windows))[-text.heldout :]
    windows = text.windows[rows]
    dense = load_model(resolve(str(asked.out.with_name("base"))), "float32", "cpu")
    targets = LiveTeacher(dense, settings.top_k, settings.temperature).targets(windows, rows)
    logits: torch.Tensor = load_model(source, "float32", "cpu")(input_ids=windows).logits
    return float(divergences(logits, targets).mean())


@pytest.mark.parametrize(
    "overrides",
    [("recover.train=layers",), ("recover.train=lora",), ("recover.teacher=cached", "recover.top_k=8")],
)
def test_divergence_of_a_model_in_16_bits_is_that_of_its_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    for module in (recovery_request, teacher):
        monkeypatch.setattr(module, "fastest_dtype", lambda device: "float32")
    pruned(tmp_path, "llama-gqa", "mixed sizes", torch.bfloat16)
    asked = request(tmp_path, *overrides)
    record = recover(asked)
    trained = min(row.heldout_divergence for row in read_training_history(asked.run) if row.heldout_divergence)
    written = heldout_divergence(asked, "better")
    assert record["loss_after"] == pytest.approx(written, rel=1e-4)
    assert abs(trained - written) > 10 * abs(record["loss_after"] - written)  # before the weights were rounded


def test_divergence_that_rounding_raises_above_the_start_is_no_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned(tmp_path, "llama-gqa", "mixed sizes", torch.bfloat16)
    monkeypatch.setattr(job, "heldout_divergence", lambda *_, **__: 1e9)
    record = recover(request(tmp_path))
    assert (record["best_step"], record["loss_after"]) == (0, record["loss_before"])


def test_teacher_that_does_not_fit_is_refused_before_the_training(folder: Path, tmp_path: Path) -> None:
    asked = request(folder, name="new")
    larger = tiny_model("llama-gqa")
    larger.resize_token_embeddings(128)
    larger.save_pretrained(tmp_path / "larger")
    save_tokenizer(tmp_path / "larger")
    with refused("larger", "vocabulary", "--teacher"):
        recover(replace(asked, teacher=str(tmp_path / "larger")))
    assert not asked.out.exists()
    assert not asked.run.exists()


def test_weights_that_were_best_on_held_out_text_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []

    def evaluate(self: RecoveryTrainer) -> float:
        """Say that the weights at the second evaluation are the best."""
        weights = {name: weight.detach().clone() for name, weight in trained_parameters(self.model).items()}
        seen.append((self.state.global_step, weights))
        return [9.0, 1.0, 2.0, 3.0][len(seen) - 1]

    monkeypatch.setattr(RecoveryTrainer, "heldout_divergence", evaluate)
    record = recover(request(folder, "recover.checkpoint_every=3", name="chosen"))
    assert [step for step, _ in seen] == [0, 3, 6, 8]
    assert (record["best_step"], record["loss_after"]) == (3, 1.0)
    written = load_file(folder / "chosen/model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in seen[1][1].items())


def test_recovery_tells_tensorboard_what_it_writes_down(folder: Path) -> None:
    pytest.importorskip("tensorboardX", reason="pgprune[tensorboard] is not installed")
    asked = request(folder, name="tracked")
    recover(asked, tracker="tensorboard")
    told, rows = scalars(asked.run), read_training_history(asked.run)
    for name in ("loss", "divergence", "heldout_divergence", "learning_rate"):
        written = {row.step: row.metrics()[name] for row in rows if name in row.metrics()}
        assert told[name] == pytest.approx(written, rel=1e-6)  # event files hold float32
    assert len(told["loss"]) == 8


def test_finished_recovery_returns_its_record(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = recovery_of(folder / "runs/better")
    assert recover(request(folder), progress=StderrProgress()) == record
    assert record == recovery_of(folder / "better")
    assert (record["steps"], record["tokens"]) == (8, 1024)
    says(capfd.readouterr().err, "runs/better", "finished already")
    with refused("runs/better", "recover.lm: 0.0 → 1.0"):
        recover(request(folder, "recover.lm=1.0"))
    with refused("runs/better", "another model"):
        recover(replace(request(folder), model=str(folder / "better")))
    with refused("runs/better", "text.txt → demo"):
        recover(request(folder, "recover.corpus=demo"))
    with refused("runs/better", "another dense model"):
        recover(replace(request(folder), teacher=str(folder / "better")))
    with refused("runs/better", "finished", "elsewhere"):
        recover(replace(request(folder), out=folder / "elsewhere"))


@pytest.mark.parametrize("format_name", ["hf", "gguf"])
def test_kill_between_the_model_and_the_record_of_its_run_costs_nothing(
    folder: Path, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format_name == "gguf":
        pytest.importorskip("gguf", reason="needs the extra: pip install 'pgprune[gguf]'")
    asked = request(folder, name=f"killed.{format_name}", format=format_name)
    killed_at(asked, job, "write_record", calls=2)
    assert not (asked.run / RECOVERY_RECORD).exists()
    taken = folder / f"another.{format_name}"
    taken.symlink_to("better" if format_name == "hf" else "text.txt")
    with refused(taken.name, "already exists"):  # the model of another run
        recover(replace(asked, out=taken))
    monkeypatch.setattr(recovery_disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    record = recover(asked)  # takes no disk, as nothing is left to write
    assert record == recovery_of(asked.run)
    assert "out" not in record
    if format_name == "hf":
        assert record == recovery_of(asked.out)
    assert not verify(asked.out).faults
    assert not (asked.run / "checkpoints").exists()
    assert not (asked.run / WRITING_RECORD).exists()


def test_kill_before_the_model_is_there_writes_it_again(folder: Path) -> None:
    asked = request(folder, name="unwritten")
    killed_at(asked, job, "plan_again")
    assert (asked.run / WRITING_RECORD).exists()
    assert not asked.out.exists()
    assert not verify(asked.run).faults
    assert recover(asked) == recovery_of(asked.out) == recovery_of(asked.run)


def test_kill_at_the_beginning_leaves_a_run_that_can_be_resumed(folder: Path) -> None:
    asked = request(folder, name="begun")
    killed_at(asked, recovery_request, "write_bytes")
    assert {path.name for path in asked.run.iterdir()} == {TRAINING_RECORD, LOCK_FILE}
    assert recover(asked)["best_step"] == recovery_of(folder / "better")["best_step"]


def test_checkpoints_that_a_kill_left_are_removed_by_the_next_start(folder: Path) -> None:
    asked = request(folder, name="left")
    killed_at(asked, job, "remove_all")
    assert (asked.run / CHECKPOINTS_FOLDER).exists()
    recover(asked)
    assert not (asked.run / CHECKPOINTS_FOLDER).exists()


def test_signal_while_the_predictions_are_checked_stops_the_recovery(folder: Path, monkeypatch) -> None:
    asked = request(folder, "recover.teacher=cached", "recover.top_k=8", name="signalled")
    cached = job.cached_teacher

    def signalled(*arguments: Any, **options: Any) -> Any:
        written = cached(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return written

    monkeypatch.setattr(job, "cached_teacher", signalled)
    with pytest.raises(Interrupted) as stopped:
        recover(asked)
    assert (stopped.value.signum, stopped.value.step) == (signal.SIGTERM, 0)
    assert not (asked.run / CHECKPOINTS_FOLDER).exists()


def test_recovered_model_can_be_recovered_again(folder: Path) -> None:
    again = replace(request(folder, name="again"), model=str(folder / "better"))
    record = recover(again)
    assert record["loss_before"] == pytest.approx(recovery_of(folder / "better")["loss_after"], rel=1e-2)
    assert [entry["student"] for entry in record["earlier"]] == [str(folder / "small")]


def test_run_directory_of_something_else_is_refused(folder: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    with refused("units", "holds a search", "--run-dir"):
        recover(replace(request(folder, name="new"), run=finished["units"]))
    run = tmp_path / "run"
    asked = replace(request(folder, name="new"), run=run)
    run.mkdir()
    text = (folder / "runs/better" / TRAINING_RECORD).read_text()
    (run / TRAINING_RECORD).write_text(text)
    (run / "recipe.yaml").write_text("")
    with refused("run", "recover.temperature: 1.0 → 2.0"):
        recover(replace(asked, recipe=recipe(folder, "recover.temperature=2.0")))
    with refused("better", "already exists"):
        recover(replace(asked, out=folder / "better"))
    assert not asked.out.exists()


def test_what_is_no_exported_model_is_refused(folder: Path, finished: dict[str, Path]) -> None:
    new = request(folder, name="new")
    with refused("units", "pgprune export"):
        recover(replace(new, model=str(finished["units"])))
    with refused("base", "decision.json"):
        recover(replace(new, model=str(folder / "base")))
    with refused("base", "--recipe"):
        recipe_of(str(folder / "base"))
    with refused("cuda:1", "CUDA_VISIBLE_DEVICES=1"):
        recover(replace(new, recipe=recipe(folder, "device=cuda:1")))
    assert not new.run.exists()
    assert not new.out.exists()


def test_full_disk_is_reported_before_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(folder, "recover.teacher=cached", "recover.top_k=8", name="new")
    monkeypatch.setattr(recovery_disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with refused("new", "checkpoints", "predictions", "model", "--run-dir or --teacher-cache or --out", error=RunError):
        recover(asked)
    assert not asked.run.exists()


def test_disk_that_holds_the_checkpoints_already_is_not_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    asked = request(folder, "recover.train=lora", name="new")
    needed: list[int] = []
    opened = open_request(asked, Ranks(), SILENT)
    for size in (0, 20_000, 10**9):
        (asked.run / "checkpoints/checkpoint-4").mkdir(parents=True, exist_ok=True)
        (asked.run / "checkpoints/checkpoint-4/optimizer.pt").write_bytes(b"." * size)
        needed.append(recovery_disk._needs(asked, opened)[0].bytes)
    assert needed[1:] == [needed[0] - 20_000, 0]
    step = asked.run / "checkpoints/checkpoint-8"
    step.mkdir()
    write_record(step / CHECKPOINT_RECORD, {})
    assert [need.what for need in recovery_disk._needs(asked, opened)] == ["the recovered model"]


@pytest.mark.parametrize("place", ["run", "teacher_cache"])
def test_output_around_the_state_of_the_training_is_refused(folder: Path, place: str) -> None:
    asked = request(folder, name="new")
    with refused("new", "cannot be written", f"--out or --{'run-dir' if place == 'run' else 'teacher-cache'}"):
        recover(replace(asked, **{place: asked.out / "inside"} if place == "teacher_cache" else {"run": asked.out}))
    assert not asked.out.exists()


def test_command_saves_when_it_is_stopped_and_prints_how_to_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps({"extends": "demo", "model": str(folder / "base")}))
    words = ["recover", str(folder / "small"), "--out", "out", "--recipe", "mine.yaml", "--run-dir", "run", "--quiet"]
    for setting in (*SMALL, f"calibration.corpus={folder / 'text.txt'}"):
        words += ["--set", setting]
    monkeypatch.setattr(sys, "argv", ["pgprune", *words])
    shown = job._show

    def show(row: TrainingRow, *context: Any) -> None:
        shown(row, *context)
        if row.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job, "_show", show)
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 143
    says(capfd.readouterr().err.strip().splitlines()[-1], "step 4", "run", shlex.join(["pgprune", *words[:4]]))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(job, "_show", shown)
    with pytest.raises(SystemExit) as finished:
        program.main()
    assert finished.value.code == 0
    assert "held-out divergence" in capfd.readouterr().out
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "better/model.safetensors").read_bytes()


def test_recovery_from_python_equals_that_of_the_command(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"extends": "demo", "model": str(folder / "base")}))
    settings = dict(setting.split("=") for setting in (*SMALL, f"calibration.corpus={folder / 'text.txt'}"))
    typed = {key: json.loads(value) if value[0].isdigit() else value for key, value in settings.items()}
    result = recover_from_python(
        folder / "small", tmp_path / "out", typed, recipe=path, run=tmp_path / "run", progress=False
    )
    assert result["model"] == str(tmp_path / "out")
    assert result["loss_after"] == recovery_of(folder / "better")["loss_after"]


def test_two_processes_train_as_one_with_twice_the_batch(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"extends": "demo", "model": str(folder / "base")}))
    words = ["recover", str(folder / "small"), "--out", "out", "--recipe", "mine.yaml", "--run-dir", "run", "--quiet"]
    for setting in (*SMALL, "recover.batch=4", f"calibration.corpus={folder / 'text.txt'}"):
        words += ["--set", setting]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "test"}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        environment = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}
        program = [sys.executable, "-m", "pgprune_cli", *words]
        started.append(subprocess.Popen(program, env=environment, cwd=tmp_path, stdout=PIPE, stderr=PIPE, text=True))
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], [err for _, err in ended]
    assert ["held-out divergence" in out for out, _ in ended] == [True, False]
    rows, expected = (read_training_history(run) for run in (tmp_path / "run", folder / "runs/better"))
    for name in ("step", "tokens", "loss", "divergence", "heldout_divergence", "learning_rate"):
        of_two, of_one = ([getattr(row, name) or 0 for row in history] for history in (rows, expected))
        assert of_two == pytest.approx(of_one, rel=2e-2), name
    assert not verify(tmp_path / "out").faults


def test_weights_are_written_as_they_were_when_the_training_does_not_help(folder: Path, capfd) -> None:
    asked = request(folder, "recover.learning_rate=3.0", "recover.tokens=384", name="worse")
    record = recover(asked, progress=StderrProgress())
    says(capfd.readouterr().err.strip().splitlines()[-2].partition(" was ")[0], "did not help")
    assert (record["best_step"], record["loss_after"]) == (0, record["loss_before"])
    weights = [load_file(folder / name / "model.safetensors") for name in ("small", "worse")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
