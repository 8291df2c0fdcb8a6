"""doctor fails exactly when a search is refused, and with the same message: both make the same checks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.messages import refused, says
from helpers.models import save_shards, save_tokenizer, tiny_model
from helpers.recipes import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from pgprune_cli.errors import UserError
from pgprune_cli.jobs.compare import compare
from pgprune_cli.jobs.doctor import doctor
from pgprune_cli.jobs.estimate import estimate
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.recipe.reader import dump, find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import SCORES_FILE
from pgprune_cli.run.lock import locked
from pgprune_cli.run.settled import settled


@dataclass(frozen=True)
class Damage:
    """Something that a search is refused for.

    facts: parts of the message; overrides: of the recipe; act: changes the files in the working directory.
    """

    facts: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    act: Callable[[], object] = lambda: None


def remove_tokenizer() -> None:
    for path in Path("model").glob("tokenizer*"):
        path.unlink()


def remove_a_shard() -> None:
    save_shards(Path("model"))
    Path("model/one.safetensors").unlink()


def edit_config(**values: object) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def scores_of_another_model() -> None:
    base = ["model=other", "scores.metric=magnitude"]
    tiny_model("llama-gqa", seed=1).save_pretrained("other")
    init_scores(load(find("demo"), [*SMALL, *OVERRIDES, *base]), Path("run"))


def recipe_of_another_search() -> None:
    Path("run").mkdir(exist_ok=True)
    Path("run/recipe.yaml").write_text(dump(settled(load(find("demo"), [*SMALL, *OVERRIDES, "seed=7"]))))


TEXT = "The old king slept. Mira owned a red kite. " * 20
OVERRIDES = (
    "model=model",
    "calibration.corpus=text.txt",
    "evaluation.corpora=[tales=text.txt]",
    "evaluation.seqlen=[16]",
)
DAMAGES = {
    "no device": Damage(("cuda:77",), ("device=cuda:77",)),
    "run is a file": Damage(("run", "not a directory", "--out"), act=lambda: Path("run").touch()),
    "run of another recipe": Damage(("run", "seed: 7 → 0"), act=recipe_of_another_search),
    "scores of another model": Damage((SCORES_FILE, "another model"), act=scores_of_another_model),
    "damaged scores": Damage(
        (SCORES_FILE,), act=lambda: (Path("run").mkdir(), (Path("run") / SCORES_FILE).write_bytes(b"nothing"))
    ),
    "no such model": Damage(("nowhere/at/all",), ("model=nowhere/at/all",)),
    "not in the cache": Damage(("someone/model", "hub"), ("model=someone/model",)),
    "no config": Damage(("model: ", "config.json"), act=lambda: Path("model/config.json").unlink()),
    "other type": Damage(("gpt2",), act=lambda: edit_config(model_type="gpt2")),
    "quantised": Damage(("quantised",), act=lambda: edit_config(quantization_config={"quant_method": "gptq"})),
    "an adapter": Damage(
        ("adapter",),
        act=lambda: (
            Path("model/model.safetensors").rename("model/adapter_model.safetensors"),
            Path("model/adapter_config.json").write_text("{}"),
        ),
    ),
    "long windows": Damage(("calibration.seqlen", "129", "128"), ("calibration.seqlen=129",)),
    "long scoring windows": Damage(("scores.seqlen", "256", "128"), ("scores.metric=flap", "scores.seqlen=256")),
    "impossible multiple": Damage(("budget.ffn_multiple", "512"), ("budget.ffn_multiple=512",)),
    "impossible minimum": Damage(
        ("budget.min_keep", "0.45"), ("budget.min_keep=0.45", "budget.sparsity=0.54", "budget.scope=per-layer")
    ),
    "no weights": Damage(("model.safetensors",), act=lambda: Path("model/model.safetensors").unlink()),
    "missing shard": Damage(("one.safetensors", "missing"), act=remove_a_shard),
    "truncated weights": Damage(
        ("model.safetensors", "damaged"), act=lambda: os.truncate("model/model.safetensors", 20_000)
    ),
    "oversized config": Damage(("9000",), act=lambda: edit_config(intermediate_size=9000)),
    "no tokenizer": Damage(("has no tokenizer", "tokenizer.json"), act=remove_tokenizer),
    "no BOS": Damage(
        ("no BOS token",), ("calibration.bos=true",), lambda: save_tokenizer(Path("model"), bos_token=None)
    ),
    "other tokenizer": Damage(("text.txt", "96 embeddings"), act=lambda: save_tokenizer(Path("model"), size=400)),
    "no text": Damage(("nothing.txt",), ("calibration.corpus=nothing.txt",)),
    "empty text": Damage(("text.txt", "no text"), act=lambda: Path("text.txt").write_text("")),
    "short text": Damage(("text.txt", "held-out"), act=lambda: Path("text.txt").write_text("ab")),
    "held-out text too long": Damage(("text.txt", "calibration.heldout"), ("calibration.heldout=4000",)),
    "damaged text": Damage(
        ("text.jsonl:1",), ("calibration.corpus=text.jsonl",), lambda: Path("text.jsonl").write_text("{")
    ),
    "corpus not in the cache": Damage(("c4", "calibration.corpus: FILE"), ("calibration.corpus=c4",)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a text that can be searched. Copied for every test."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("llama-gqa").save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def recipe_with(*damages: Damage) -> Recipe:
    overrides = [override for damage in damages for override in damage.overrides]
    return load(find("demo"), [*SMALL, *OVERRIDES, "search.forward_passes=0", "scores.metric=magnitude", *overrides])


def damaged_copy(whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *damages: Damage) -> Recipe:
    """Work in a copy of `whole` with some damage, and return the recipe."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    for damage in damages:
        damage.act()
    return recipe_with(*damages)


def refusals(recipe: Recipe) -> list[str]:
    """Return what doctor says to fix before a search can begin, in order. It must write nothing."""
    before = sorted(Path().rglob("*"))
    fixes = [finding.fix for finding in doctor(recipe, Path("run")) if finding.fails]
    assert sorted(Path().rglob("*")) == before
    return fixes


@pytest.mark.parametrize("name", DAMAGES)
def test_doctor_fails_with_the_message_of_the_search(name, whole, tmp_path, monkeypatch) -> None:
    recipe = damaged_copy(whole, tmp_path, monkeypatch, DAMAGES[name])
    found = refusals(recipe)
    with pytest.raises(UserError) as error:
        search(recipe, Path("run"))
    assert found[0] == str(error.value)
    for fact in DAMAGES[name].facts:
        assert fact in found[0]


@given(names=st.lists(st.sampled_from(sorted(DAMAGES)), min_size=2, max_size=3, unique=True))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_doctor_fails_first_with_what_the_search_is_refused_for(names, whole, tmp_path_factory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            recipe = damaged_copy(whole, tmp_path_factory.mktemp("damaged"), patch, *(DAMAGES[name] for name in names))
        except (OSError, UserError, SafetensorError):  # one kind of damage leaves nothing for the next
            return
        found = refusals(recipe)
        with pytest.raises(UserError) as error:
            search(recipe, Path("run"))
    assert found[0] == str(error.value)


def test_doctor_passes_what_a_search_runs(whole, tmp_path, monkeypatch) -> None:
    recipe = damaged_copy(whole, tmp_path, monkeypatch)
    assert refusals(recipe) == []
    search(recipe, Path("run"))
    assert refusals(recipe) == []


def test_doctor_fails_while_another_process_uses_the_directory(whole, tmp_path, monkeypatch) -> None:
    recipe = damaged_copy(whole, tmp_path, monkeypatch)
    with locked(Path("run")):
        found = refusals(recipe)
        with pytest.raises(UserError) as error:
            search(recipe, Path("run"))
    assert found == [str(error.value)]
    assert f"process {os.getpid()}" in found[0]


def test_doctor_fails_for_a_directory_that_cannot_be_written(whole, tmp_path, monkeypatch) -> None:
    recipe = damaged_copy(whole, tmp_path, monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = refusals(recipe)
    with refused("run: ", "not writable", "--out"):
        search(recipe, Path("run"))
    assert any("run: " in fix for fix in found)


@pytest.mark.parametrize(
    "name", ["no device", "other type", "quantised", "long scoring windows", "impossible multiple"]
)
def test_estimate_and_init_scores_are_refused_as_the_search(name, whole, tmp_path, monkeypatch) -> None:
    recipe = damaged_copy(whole, tmp_path, monkeypatch, DAMAGES[name])
    messages = set()
    for job in (estimate, lambda recipe: init_scores(recipe, Path("run")), lambda recipe: search(recipe, Path("run"))):
        with pytest.raises(UserError) as error:
            job(recipe)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_compare_is_refused_before_the_first_search_for_what_only_one_row_needs(whole, tmp_path, monkeypatch) -> None:
    """The recipe's own metric reads no text, but those of other rows do, in windows that are too long."""
    recipe = damaged_copy(whole, tmp_path, monkeypatch, Damage((), ("scores.seqlen=256",)))
    assert refusals(recipe) == []
    with refused("scores.seqlen", "256", "128"):
        compare(recipe, Path("table"))
    assert not Path("table").exists()


def test_doctor_warns_of_evaluation_windows_that_will_be_shortened(whole, tmp_path, monkeypatch) -> None:
    overrides = ("evaluation.seqlen=[16,2048]", "evaluation.corpora=[tales=other.txt]")
    other_text = Damage((), overrides, lambda: Path("other.txt").write_text(TEXT.upper()))
    recipe = damaged_copy(whole, tmp_path, monkeypatch, other_text)
    (finding,) = (finding for finding in doctor(recipe) if finding.status != "OK")
    assert finding.status == "WARN"
    says(finding.text(), "evaluation.seqlen 2048", "128 tokens")


def test_doctor_warns_of_a_recovery_that_would_train_on_evaluation_text(whole, tmp_path, monkeypatch) -> None:
    """A search may be calibrated on that text, but its exported model would then have no text to be recovered with."""
    recipe = damaged_copy(whole, tmp_path, monkeypatch)
    (finding,) = (finding for finding in doctor(recipe) if finding.status != "OK")
    assert finding.status == "WARN"
    says(finding.text(), "text.txt", "evaluation text", "recover.corpus", "Only recover reads")


def test_checks_read_no_values_of_weights(whole, tmp_path, monkeypatch) -> None:
    recipe = damaged_copy(whole, tmp_path, monkeypatch)
    monkeypatch.setattr("pgprune_cli.model.loading.read_weights", None)
    monkeypatch.setattr(torch, "frombuffer", None)
    assert refusals(recipe) == []
