"""The eval job: perplexity against a plain reference, and the masked, the exported and the dense model alike."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import VOCABULARY, tiny_model
from torch.nn import functional

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.demo.grammar import generate
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.jobs.evaluate import (
    Corpus,
    evaluate,
    measure_speed,
    open_target,
    perplexity,
    remember,
)
from pgprune_cli.jobs.export import export
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.recipe.schema import Evaluation
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, EVALUATION_FILE
from pgprune_cli.storage.records import read_record, write_record


def stream(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def reference(model, windows: list[torch.Tensor]) -> tuple[float, int]:
    """Window by window, on all logits at once, every prediction counting the same."""
    nats, predicted = 0.0, 0
    for window in windows:
        with torch.inference_mode():
            logits = model(window[None]).logits[0, :-1].double()
        nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
        predicted += len(window) - 1
    return math.exp(nats / predicted), predicted


@pytest.mark.parametrize("length", [2, 16, 17, 18, 50, 100])
@pytest.mark.parametrize("seqlen", [2, 16, 64])
def test_perplexity_is_that_of_a_plain_loop(length: int, seqlen: int) -> None:
    model, tokens = tiny_model("llama-gqa"), stream(length)
    windows = [window for window in tokens.split(seqlen) if len(window) > 1]
    ppl, predicted = perplexity(model, tokens, seqlen)
    expected, count = reference(model, windows)
    assert predicted == count
    assert ppl == pytest.approx(expected, rel=1e-5)


def test_a_limit_takes_windows_spread_over_the_text() -> None:
    model, tokens = tiny_model("llama-gqa"), stream(100)
    windows = tokens.split(10)
    ppl, predicted = perplexity(model, tokens, seqlen=10, limit=4)
    expected, count = reference(model, [windows[0], windows[2], windows[5], windows[7]])
    assert predicted == count
    assert ppl == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokens, seqlen=10, limit=99) == perplexity(model, tokens, seqlen=10)


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="fewer than 2 tokens"):
        perplexity(tiny_model("llama-gqa"), stream(1), seqlen=8)


def test_a_model_that_overflows_fails_the_run() -> None:
    model = tiny_model("llama-gqa")
    model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(RunError, match=r"the loss is not finite \(nan nats per token\); try --dtype float32"):
        perplexity(model, stream(20), seqlen=8)


def test_corpora_are_names_or_named_files() -> None:
    assert Corpus.parse("c4") == Corpus("c4", "c4")
    assert Corpus.parse("wikitext2=a/b=c.txt") == Corpus("wikitext2", "a/b=c.txt")
    assert Corpus.parse("a/b=c.txt") == Corpus("a/b=c.txt", "a/b=c.txt")
    for bad in ("", "=x.txt", "wikitext2="):
        with pytest.raises(UserError) as error:
            Corpus.parse(bad)
        assert str(error.value) == f"--ppl {bad}: expected a corpus name or NAME=FILE"


# --- a run, its export, its base


@pytest.fixture
def text(tmp_path: Path) -> Corpus:
    (tmp_path / "evaluation.txt").write_text(generate(seed=9, characters=3000))
    return Corpus("tales", str(tmp_path / "evaluation.txt"))


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that has not been measured."""
    shutil.copytree(finished["units"], tmp_path / "run")
    (tmp_path / "run" / EVALUATION_FILE).unlink()
    return tmp_path / "run"


def test_a_run_and_its_export_measure_the_same(run: Path, text: Corpus, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    results = [
        evaluate(open_target(str(where), device="cpu"), [text], [32, 64], None) for where in (run, tmp_path / "small")
    ]
    masked, exported = results
    assert exported["parameters"] == masked["parameters"]
    for one, other in zip(masked["perplexity"], exported["perplexity"], strict=True):
        assert {key: one[key] for key in ("corpus", "seqlen", "tokens")} == {
            key: other[key] for key in ("corpus", "seqlen", "tokens")
        }
        assert other["ppl"] == pytest.approx(one["ppl"], rel=1e-5)
    dense = evaluate(open_target("demo", device="cpu"), [text], [32], None)
    assert dense["parameters"] > 1.2 * exported["parameters"]
    assert dense["perplexity"][0]["ppl"] < exported["perplexity"][0]["ppl"]


def test_the_result_is_the_documented_object(text: Corpus) -> None:
    target = open_target("demo", device="cpu")
    result = evaluate(target, [text], [32], None)
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["model", "dtype", "device", "parameters", "perplexity"]
    tokens = tokens_of(text.text, "evaluation", load_tokenizer(target.source))
    ppl, predicted = perplexity(target.model, tokens, 32)
    assert result["perplexity"] == [{"corpus": "tales", "seqlen": 32, "ppl": ppl, "tokens": predicted}]
    assert (result["model"], result["dtype"], result["device"]) == ("demo", "float32", "cpu")


def test_windows_longer_than_the_model_reads_become_its_limit(text: Corpus) -> None:
    target = open_target("demo", device="cpu")
    longest = target.model.config.max_position_embeddings
    rows = evaluate(target, [text], [longest, 10**6, 32], None)["perplexity"]
    assert [row["seqlen"] for row in rows] == [32, longest]


def test_a_limit_reads_as_much_text_at_every_length(text: Corpus) -> None:
    target = open_target("demo", device="cpu")
    rows = evaluate(target, [text], [16, 32, 64], 8)["perplexity"]
    assert [row["tokens"] for row in rows] == [8 * 15, 4 * 31, 2 * 63]


def test_a_run_is_evaluated_as_its_recipe_says(run: Path, small) -> None:
    target = open_target(str(run))
    assert target.evaluation == small().evaluation
    assert target.base == "demo"


def test_an_export_is_evaluated_as_its_recipe_says(run: Path, small, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    assert small().evaluation != Evaluation()
    assert open_target(str(tmp_path / "small"), device="cpu").evaluation == small().evaluation


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("part", [DECISION_RECORD, DECISION_MASKS])
def test_an_export_whose_decision_is_damaged_is_refused(part: str, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    cut(tmp_path / "small" / part)
    with pytest.raises(UserError) as refused:
        open_target(str(tmp_path / "small"), device="cpu")
    assert str(refused.value).startswith(f"{tmp_path / 'small' / part}: ")
    assert "\n" not in str(refused.value)


def test_an_export_by_another_version_is_evaluated_by_the_defaults(run: Path, tmp_path: Path, capfd) -> None:
    export(run, tmp_path / "small")
    record = tmp_path / "small" / DECISION_RECORD
    whole = read_record(record)
    write_record(record, whole | {"recipe": whole["recipe"] + "of_another_version: 3\n"})
    target = open_target(str(tmp_path / "small"), device="cpu")
    assert (target.evaluation, target.base) == (Evaluation(), "demo")
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert said == [
        f"{record}: its recipe is of another pgprune, and what it says to evaluate is not known: the defaults are taken"
    ]
    write_record(record, whole | {"recipe": whole["recipe"].replace("sparsity: 0.5", "sparsity: half")})
    with pytest.raises(UserError, match=rf"^{record}: its recipe:\d+: budget.sparsity: expected a number"):
        open_target(str(tmp_path / "small"), device="cpu")
    write_record(record, {key: value for key, value in whole.items() if key != "recipe"})
    with pytest.raises(UserError, match=f"^{record}: 'recipe' is missing; the file is not a whole decision$"):
        open_target(str(tmp_path / "small"), device="cpu")


def test_an_export_from_the_hub_comes_without_its_masks(run: Path, small, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    (tmp_path / "small" / DECISION_MASKS).unlink()
    target = open_target(str(tmp_path / "small"), device="cpu")
    assert (target.evaluation, target.base) == (small().evaluation, "demo")


def test_what_was_measured_stands_in_the_model_card(run: Path, text: Corpus, tmp_path: Path) -> None:
    target = open_target(str(run), device="cpu")
    result = evaluate(target, [text], [32], None)
    remember(target, result)
    assert read_record(run / EVALUATION_FILE) == result
    export(run, tmp_path / "small")
    row = result["perplexity"][0]
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| tales | 32 | {row['ppl']:.2f} | {row['tokens']:,} |" in card


def test_a_run_whose_base_changed_is_refused(run: Path) -> None:
    write_record(run / "decision.json", read_record(run / "decision.json") | {"fingerprint": "0" * 64})
    with pytest.raises(UserError) as error:
        open_target(str(run), device="cpu")
    assert str(error.value) == f"{run}: demo is not the model that was searched; its files have changed"


def test_a_run_without_a_decision_is_refused(run: Path) -> None:
    (run / "decision.json").unlink()
    with pytest.raises(UserError, match="its search is not finished"):
        open_target(str(run), device="cpu")


def test_speed_is_measured_of_models_not_of_runs(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    small, dense = (open_target(str(name), device="cpu") for name in (tmp_path / "small", "demo"))
    measured = measure_speed([small, dense])
    for speed in measured:
        assert speed["prefill_tokens_per_second"] > 0
        assert speed["decode_tokens_per_second"] > 0
        assert speed["peak_memory_bytes"] is None
    assert measured[0]["weight_bytes"] == 4 * small.parameters()
    assert measured[1]["weight_bytes"] == 4 * dense.parameters()
    with pytest.raises(ValueError, match="speed is measured on an exported model"):
        measure_speed([open_target(str(run), device="cpu")])
