"""The eval job: perplexity against a plain reference, and equal results for a run and its export."""

from __future__ import annotations

import errno
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused, says
from helpers.models import VOCABULARY, save_tokenizer, tiny_model
from torch.nn import functional

from pgprune_cli.console.progress import StderrProgress
from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.demo.grammar import generate
from pgprune_cli.errors import RunError
from pgprune_cli.jobs import evaluate as job
from pgprune_cli.jobs import targets
from pgprune_cli.jobs.evaluate import evaluate
from pgprune_cli.jobs.evaluation_request import Corpus, EvaluationRequest
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.perplexity import measure_perplexity, perplexity
from pgprune_cli.jobs.speed import measure_speed
from pgprune_cli.jobs.targets import open_target
from pgprune_cli.model import families, unit_tensors
from pgprune_cli.model.families.llama import LLAMA
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.recipe.schema import EvaluationSettings
from pgprune_cli.run.evaluation import measurements
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, EVALUATION_FILE
from pgprune_cli.storage.records import read_record, write_record


def stream(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def reference(model, windows: list[torch.Tensor]) -> tuple[float, int]:
    """Return perplexity and predictions, window by window, on all logits at once."""
    nats, predicted = 0.0, 0
    for window in windows:
        with torch.inference_mode():
            logits = model(window[None]).logits[0, :-1].double()
        nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
        predicted += len(window) - 1
    return math.exp(nats / predicted), predicted


@pytest.mark.parametrize("length", [2, 16, 17, 18, 50, 100])
@pytest.mark.parametrize("seqlen", [2, 16, 64])
def test_perplexity_equals_that_of_a_plain_loop(length: int, seqlen: int) -> None:
    model, tokens = tiny_model("llama-gqa"), stream(length)
    windows = [window for window in tokens.split(seqlen) if len(window) > 1]
    ppl, predicted = perplexity(model, tokens, seqlen)
    expected, count = reference(model, windows)
    assert predicted == count
    assert ppl == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 50, 100])
@pytest.mark.parametrize("seqlen", [2, 16, 64])
def test_perplexity_with_bos_predicts_every_token_of_the_text_once(length: int, seqlen: int) -> None:
    model, tokens = tiny_model("llama-gqa"), stream(length)
    windows = [torch.cat([torch.tensor([1]), part]) for part in tokens.split(seqlen - 1)]
    assert {len(window) for window in windows[:-1]} <= {seqlen}
    ppl, predicted = perplexity(model, tokens, seqlen, bos=1)
    expected, count = reference(model, windows)
    assert predicted == count == length
    assert ppl == pytest.approx(expected, rel=1e-5)


def test_max_windows_takes_windows_spread_over_the_text() -> None:
    model, tokens = tiny_model("llama-gqa"), stream(100)
    windows = tokens.split(10)
    ppl, predicted = perplexity(model, tokens, seqlen=10, max_windows=4)
    expected, count = reference(model, [windows[0], windows[2], windows[5], windows[7]])
    assert predicted == count
    assert ppl == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokens, seqlen=10, max_windows=99) == perplexity(model, tokens, seqlen=10)


def test_perplexity_of_one_token_is_refused() -> None:
    with refused("fewer than 2 tokens"):
        perplexity(tiny_model("llama-gqa"), stream(1), seqlen=8)


def test_perplexity_raises_a_run_error_when_the_loss_overflows() -> None:
    model = tiny_model("llama-gqa")
    model.model.norm.weight.fill_(float("inf"))
    with refused("not finite", "nan nats per token", "--dtype float32", error=RunError):
        perplexity(model, stream(20), seqlen=8)


def test_corpus_parses_names_and_named_files() -> None:
    assert Corpus.parse("c4") == Corpus("c4", "c4")
    assert Corpus.parse("wikitext2=a/b=c.txt") == Corpus("wikitext2", "a/b=c.txt")
    assert Corpus.parse("a/b=c.txt") == Corpus("a/b=c.txt", "a/b=c.txt")
    for bad in ("", "=x.txt", "wikitext2="):
        with refused(f"--ppl {bad}: ", "NAME=FILE"):
            Corpus.parse(bad)


# --- a run, its export, its base


@pytest.fixture
def text(tmp_path: Path) -> Corpus:
    (tmp_path / "evaluation.txt").write_text(generate(seed=9, characters=3000))
    return Corpus("tales", str(tmp_path / "evaluation.txt"))


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a finished run without an evaluation."""
    shutil.copytree(finished["units"], tmp_path / "run")
    (tmp_path / "run" / EVALUATION_FILE).unlink()
    return tmp_path / "run"


def test_run_and_its_export_have_the_same_perplexity(run: Path, text: Corpus, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    names = [str(run), str(tmp_path / "small"), "demo"]
    pruned, exported, dense = targets = [open_target(name, device="cpu") for name in names]
    assert exported.parameters == pruned.parameters
    assert dense.parameters > 1.2 * exported.parameters
    masked_rows, exported_rows, dense_rows = (measure_perplexity(target, [text], [32, 64]) for target in targets)
    for masked_row, exported_row in zip(masked_rows, exported_rows, strict=True):
        assert exported_row == masked_row | {"ppl": pytest.approx(masked_row["ppl"], rel=1e-5)}
    assert dense_rows[0]["ppl"] < exported_rows[0]["ppl"]


def test_no_forward_pass_of_a_run_gathers_weights(run: Path, text: Corpus, monkeypatch) -> None:
    target = open_target(str(run), device="cpu")
    monkeypatch.setattr(unit_tensors, "gather", None)
    assert measure_perplexity(target, [text], [32])[0]["ppl"] > 1


@pytest.mark.parametrize(
    ("numbers", "fact"),
    [
        ({"seqlens": [32, 1]}, "--seqlen 1: "),
        ({"seqlens": [0]}, "--seqlen 0: "),
        ({"max_windows": 0}, "--max-windows 0: "),
        ({"max_items": 0}, "--max-items 0: "),
    ],
)
def test_numbers_that_are_too_small_are_refused(numbers, fact) -> None:
    with refused(fact):
        EvaluationRequest(model="demo", **numbers).check()


def test_evaluate_returns_the_documented_object(text: Corpus) -> None:
    request = EvaluationRequest(model="demo", corpora=[f"tales={text.text}"], seqlens=[32], device="cpu")
    (result,) = evaluate(request)
    target = open_target("demo", device="cpu")
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["model", "dtype", "device", "parameters", "perplexity"]
    tokens = tokens_of(text.text, "evaluation", load_tokenizer(target.source))
    ppl, predicted = perplexity(target.module, tokens, 32)
    assert result["perplexity"] == [{"corpus": "tales", "seqlen": 32, "bos": False, "ppl": ppl, "tokens": predicted}]
    assert (result["model"], result["dtype"], result["device"]) == ("demo", "float32", "cpu")


@pytest.mark.parametrize("bos", [True, False])
def test_rows_say_whether_their_windows_begin_with_bos(bos: bool, text: Corpus) -> None:
    request = EvaluationRequest(
        model="demo", corpora=[f"tales={text.text}"], seqlens=[32], device="cpu", bos=bos, baselines=["demo"]
    )
    for result in evaluate(request):
        assert [row["bos"] for row in result["perplexity"]] == [bos]
        assert list(measurements(result)) == ["parameters", f"tales PPL, 32 tokens{', with BOS' if bos else ''}"]


def test_baselines_are_measured_with_the_setting_of_the_run(run: Path, text: Corpus) -> None:
    recipe = run / "recipe.yaml"
    before, after = recipe.read_text().rsplit("bos: auto", 1)
    recipe.write_text(f"{before}bos: true{after}")
    request = EvaluationRequest(
        model=str(run), corpora=[f"tales={text.text}"], seqlens=[32], max_windows=2, baselines=["demo"]
    )
    assert [row["bos"] for result in evaluate(request) for row in result["perplexity"]] == [True, True]


def test_auto_begins_windows_with_bos_if_the_family_was_trained_so(tmp_path: Path, text: Corpus, monkeypatch) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", add_bos_token=True)
    request = EvaluationRequest(model=str(tmp_path / "model"), corpora=[f"t={text.text}"], seqlens=[16], max_windows=2)
    (result,) = evaluate(request)
    assert not result["perplexity"][0]["bos"]
    monkeypatch.setattr(families, "FAMILIES", (replace(LLAMA, bos_types=("llama",)),))
    (result,) = evaluate(request)
    assert result["perplexity"][0]["bos"]


def test_a_tokenizer_without_bos_is_refused_before_the_model_is_loaded(
    tmp_path: Path, text: Corpus, monkeypatch
) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", bos_token=None)
    monkeypatch.setattr(targets, "load_model", None)
    with refused(f"{tmp_path / 'model'}: ", "no BOS token"):
        evaluate(EvaluationRequest(model=str(tmp_path / "model"), corpora=[f"tales={text.text}"], bos=True))


def test_window_lengths_beyond_the_context_are_lowered_to_it(text: Corpus) -> None:
    target = open_target("demo", device="cpu")
    longest = target.module.config.max_position_embeddings
    rows = measure_perplexity(target, [text], [longest, 10**6, 32])
    assert [row["seqlen"] for row in rows] == [32, longest]


def test_max_windows_reads_equally_many_tokens_at_every_length(text: Corpus) -> None:
    target = open_target("demo", device="cpu")
    rows = measure_perplexity(target, [text], [16, 32, 64], max_windows=8)
    assert [row["tokens"] for row in rows] == [8 * 15, 4 * 31, 2 * 63]


def test_target_of_a_run_has_its_recipes_evaluation(run: Path, small) -> None:
    target = open_target(str(run))
    assert target.evaluation == small().evaluation


def test_target_of_an_export_has_its_recipes_evaluation(run: Path, small, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    assert small().evaluation != EvaluationSettings()
    assert open_target(str(tmp_path / "small"), device="cpu").evaluation == small().evaluation


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9])


@pytest.mark.parametrize("part", [DECISION_RECORD, DECISION_MASKS])
def test_open_target_refuses_an_export_with_a_damaged_decision(part: str, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    truncate(tmp_path / "small" / part)
    with refused(f"{tmp_path / 'small' / part}: "):
        open_target(str(tmp_path / "small"), device="cpu")


def test_target_of_an_export_by_another_version_has_the_default_evaluation(run: Path, tmp_path: Path, capfd) -> None:
    export(run, tmp_path / "small")
    record = tmp_path / "small" / DECISION_RECORD
    whole = read_record(record)
    write_record(record, whole | {"recipe": whole["recipe"] + "of_another_version: 3\n"})
    target = open_target(str(tmp_path / "small"), device="cpu", progress=StderrProgress())
    assert target.evaluation == EvaluationSettings()
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("loading ")]
    says(warning, f"{record}: ", "another version")
    write_record(record, whole | {"recipe": whole["recipe"].replace("sparsity: 0.5", "sparsity: half")})
    with refused(f"{record}: its recipe:", "budget.sparsity"):
        open_target(str(tmp_path / "small"), device="cpu")
    write_record(record, {key: value for key, value in whole.items() if key != "recipe"})
    with refused(f"{record}: ", "recipe"):
        open_target(str(tmp_path / "small"), device="cpu")


def test_target_of_an_export_needs_no_masks(run: Path, small, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    (tmp_path / "small" / DECISION_MASKS).unlink()
    target = open_target(str(tmp_path / "small"), device="cpu")
    assert target.evaluation == small().evaluation


def test_evaluation_of_a_run_is_stored_and_written_into_the_model_card(run: Path, text: Corpus, tmp_path: Path) -> None:
    (result,) = evaluate(EvaluationRequest(model=str(run), corpora=[f"tales={text.text}"], seqlens=[32]))
    assert read_record(run / EVALUATION_FILE) == result
    export(run, tmp_path / "small")
    row = result["perplexity"][0]
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"| tales | 32 | {row['ppl']:.2f} | {row['tokens']:,} |" in card


def test_evaluations_of_other_texts_are_added_and_of_the_same_text_replaced(run: Path, text: Corpus, tmp_path) -> None:
    (tmp_path / "other.txt").write_text("The king was glad. " * 40)

    def rows(*corpora: str) -> list[tuple[str, int]]:
        evaluate(EvaluationRequest(model=str(run), corpora=corpora, seqlens=[32]))
        return [(row["corpus"], row["tokens"]) for row in read_record(run / EVALUATION_FILE)["perplexity"]]

    first, second = f"tales={text.text}", f"other={tmp_path / 'other.txt'}"
    tales = rows(first)
    (other,) = set(rows(second)) - set(tales)
    assert rows(second) == [*tales, other]
    (tmp_path / "other.txt").write_text("The queen was sad. " * 80)
    changed = rows(second)
    assert changed[:1] == tales and changed[1][0] == "other" and changed[1] != other


def test_damaged_results_are_refused_before_anything_is_measured(run: Path, text: Corpus, monkeypatch) -> None:
    (run / EVALUATION_FILE).write_text("{}")
    monkeypatch.setattr(job, "measure_perplexity", None)
    with refused("evaluation.json", "damaged"):
        evaluate(EvaluationRequest(model=str(run), corpora=[f"tales={text.text}"], seqlens=[32]))


def test_results_that_cannot_be_stored_are_still_returned(run: Path, text: Corpus, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job, "write_record", full)
    (result,) = evaluate(EvaluationRequest(model=str(run), corpora=[f"tales={text.text}"], seqlens=[32]))
    assert result["perplexity"][0]["ppl"] > 1
    says(capsys.readouterr().err.strip(), "evaluation.json", "cannot be stored", "No space left")


def test_two_texts_of_one_name_are_refused(text: Corpus, small) -> None:
    with refused("--ppl mine", "NAME=FILE"):
        EvaluationRequest(model="demo", corpora=[f"mine={text.text}", f"mine={text.text}"]).check()
    other = Path(text.text).parent / "again.txt"
    shutil.copy(text.text, other)
    with refused("evaluation.corpora: mine", "NAME=FILE"):
        Corpus.of(small(f"evaluation.corpora=[mine={text.text},mine={other}]").evaluation)


def test_open_target_refuses_a_run_whose_base_model_changed(run: Path) -> None:
    record = read_record(run / "decision.json")
    base = {name: part for name, part in record["base"].items() if name != "model.layers.1"}
    write_record(run / "decision.json", record | {"fingerprint": "0" * 64, "base": base})
    with refused("demo: not the model that was searched", "model.layers.1."):
        open_target(str(run), device="cpu")


def test_open_target_refuses_a_decision_of_an_earlier_version(run: Path) -> None:
    record = read_record(run / "decision.json")
    del record["base"]
    write_record(run / "decision.json", record | {"fingerprint": "0" * 64, "version": 2})
    with refused(f"{run / 'decision.json'}: ", "earlier version"):
        open_target(str(run), device="cpu")


def test_speed_beside_a_base_model_that_changed_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    export(run, out)
    record = read_record(out / "decision.json")
    write_record(out / "decision.json", record | {"fingerprint": "0" * 64, "base": record["base"] | {"x": "y"}})
    with refused("demo: not the model that was searched", ": x."):
        evaluate(EvaluationRequest(model=str(out), speed=True))


def test_open_target_refuses_a_run_without_a_decision(run: Path) -> None:
    (run / "decision.json").unlink()
    with refused(str(run), "not finished"):
        open_target(str(run), device="cpu")


def test_measure_speed_warns_of_nothing_in_a_generation_config(tmp_path: Path, caplog) -> None:
    """transformers warns once for every call if the model's own config has max_length, as Llama 2's and Vicuna's do."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    tiny_model("llama-gqa").save_pretrained(tmp_path)
    target = open_target(str(tmp_path), device="cpu")
    own = GenerationConfig(max_length=40, temperature=0.9, top_p=0.6, repetition_penalty=1.2, eos_token_id=2)
    target.module.generation_config = own
    caplog.clear()
    logger = logging.get_logger()
    logger.addHandler(caplog.handler)
    try:
        measure_speed([target])
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert target.module.generation_config is own


def test_measure_speed_measures_models_but_no_runs(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "small")
    small, dense = (open_target(str(name), device="cpu") for name in (tmp_path / "small", "demo"))
    measured = measure_speed([small, dense])
    for speed in measured:
        assert speed["prefill_tokens_per_second"] > 0
        assert speed["decode_tokens_per_second"] > 0
        assert speed["peak_memory_bytes"] is None
    assert measured[0]["weight_bytes"] == 4 * small.parameters
    assert measured[1]["weight_bytes"] == 4 * dense.parameters
    with pytest.raises(ValueError, match="speed is measured on an exported model"):
        measure_speed([open_target(str(run), device="cpu")])
