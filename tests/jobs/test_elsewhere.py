"""Runs and exports that are used from another directory, and base models that moved."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.messages import refused, says
from helpers.searches import after_step
from safetensors.torch import load_file, save_file

from pgprune_cli.console.progress import Progress
from pgprune_cli.jobs.evaluate import evaluate
from pgprune_cli.jobs.evaluation_request import EvaluationRequest
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.source import DEMO_MODEL
from pgprune_cli.recipe.reader import load
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.interruption import Interrupted

ALWAYS = ("calibration.corpus=text.txt", "evaluation.corpora=[text.txt, other=text.txt]", "evaluation.seqlen=[32]")


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, a text and a finished run, and another one to work in."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    shutil.copytree(DEMO_MODEL, tmp_path / "here" / "ckpt" / "step1")
    (tmp_path / "here" / "text.txt").write_text("The king was glad. The queen saw a dog. " * 300)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def run(place: Path, small, monkeypatch: pytest.MonkeyPatch) -> Path:
    search(small("model=ckpt/step1", *ALWAYS), Path("run"))
    monkeypatch.chdir(place / "elsewhere")
    return place / "here" / "run"


@pytest.fixture
def moved(run: Path, place: Path) -> Path:
    """Where the base model is, after it moved."""
    return Path(shutil.move(place / "here" / "ckpt", place / "ckpt")) / "step1"


def change(model: Path) -> None:
    """Change one matrix of a model."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= -3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_run_names_its_model_and_texts_by_absolute_paths(run: Path, place: Path) -> None:
    recipe, text = load(run / "recipe.yaml"), str(place / "here" / "text.txt")
    assert recipe.model == Decision.load(run).model == str(place / "here" / "ckpt" / "step1")
    assert recipe.calibration.corpus == text
    assert recipe.evaluation.corpora == (f"text.txt={text}", f"other={text}")


def test_a_run_that_moved_is_evaluated_and_exported_from_another_directory(run: Path, place: Path) -> None:
    run = Path(shutil.move(run, place / "elsewhere" / "mine"))
    (result,) = evaluate(EvaluationRequest(model="mine"))
    assert [row["corpus"] for row in result["perplexity"]] == ["text.txt", "other"]
    export(Path("mine"), Path("out"))
    assert verify(run).faults == []
    small, base = evaluate(EvaluationRequest(model="out", speed=True))
    assert base["model"] == str(place / "here" / "ckpt" / "step1")
    assert base["parameters"] > small["parameters"]


def test_a_missing_base_model_is_said_to_be_missing(run: Path, moved: Path) -> None:
    for use in (lambda: export(run, Path("out")), lambda: evaluate(EvaluationRequest(model=str(run)))):
        with refused("ckpt/step1: missing", "--model"):
            use()
    assert verify(run).faults == []  # the run itself is whole


def test_model_says_where_the_base_model_is_now(run: Path, moved: Path, place: Path) -> None:
    export(run, Path("out"), base=str(moved))
    (result,) = evaluate(EvaluationRequest(model=str(run), base=str(moved)))
    assert len(result["perplexity"]) == 2
    assert len(evaluate(EvaluationRequest(model="out", speed=True))) == 2  # the export names the new place

    change(moved)
    for use in (
        lambda: export(run, Path("again"), base=str(moved)),
        lambda: evaluate(EvaluationRequest(model=str(run), base=str(moved))),
        lambda: evaluate(EvaluationRequest(model="out", speed=True, base=str(moved))),
    ):
        with refused(f"{moved}: not the model that was searched", "model.layers.1"):
            use()


def test_the_speed_of_an_export_is_measured_alone_without_its_base_model(run: Path, place: Path) -> None:
    export(run, Path("out"))
    shutil.rmtree(place / "here" / "ckpt")
    notes = Notes()
    (result,) = evaluate(EvaluationRequest(model="out", speed=True), progress=notes)
    assert result["speed"]["decode_tokens_per_second"] > 0
    says("\n".join(notes.lines), "ckpt/step1: missing", "--model", "out")
    with refused("nowhere"):
        evaluate(EvaluationRequest(model="out", speed=True, base="/nowhere"))


@pytest.mark.parametrize("request_", [{"corpora": ["demo"]}, {"speed": True}], ids=["perplexity", "speed"])
def test_model_is_refused_for_a_model_without_a_base(request_) -> None:
    with refused("--model demo", "demo"):
        evaluate(EvaluationRequest(model="demo", base="demo", **request_))


def test_a_finished_search_answers_with_its_model_elsewhere(run: Path, moved: Path, small, monkeypatch) -> None:
    monkeypatch.chdir(run.parent)
    again = search(small(f"model={moved}", *ALWAYS), run)
    assert torch.equal(again.model_mask[0].ffn, Decision.load(run).model_mask[0].ffn)
    change(moved)
    with refused("model: ", f"→ {moved}"):
        search(small(f"model={moved}", *ALWAYS), run)


def test_a_finished_search_whose_model_changed_since_is_refused(run: Path, place: Path, small, monkeypatch) -> None:
    monkeypatch.chdir(run.parent)
    change(Path("ckpt/step1"))
    with refused(f"{run}: ", "ckpt/step1: not the model", "model.layers.1"):
        search(small("model=ckpt/step1", *ALWAYS), run)


def test_a_search_resumes_with_its_model_elsewhere(place: Path, small) -> None:
    def stop() -> None:
        signal.raise_signal(signal.SIGINT)

    whole = search(small("model=ckpt/step1", *ALWAYS), Path("whole"))
    with after_step(2, stop), pytest.raises(Interrupted):
        search(small("model=ckpt/step1", *ALWAYS), Path("run"))
    moved = str(shutil.move("ckpt/step1", place / "moved"))
    resumed = search(small(f"model={moved}", *ALWAYS), Path("run"))
    assert resumed.model == load(Path("run/recipe.yaml")).model == moved
    assert resumed.heldout_loss == whole.heldout_loss
    for left, right in zip(resumed.model_mask, whole.model_mask, strict=True):
        assert torch.equal(left.attention, right.attention) and torch.equal(left.ffn, right.ffn)
