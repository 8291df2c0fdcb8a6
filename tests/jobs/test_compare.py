"""compare: every variant runs once, and the table is written for people and for programs."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
from helpers.messages import refused

from pgprune_cli.jobs import compare as job
from pgprune_cli.jobs.compare import EvaluationConditions, compare
from pgprune_cli.jobs.variants import select_variants, variants_of
from pgprune_cli.repair.width_table import solve_layers
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import (
    COMPARISON_RECORD,
    COMPARISON_TABLE,
    DECISION_MASKS,
    MEASURED_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    TABLES_FOLDER,
)
from pgprune_cli.search import table
from pgprune_cli.storage.records import read_record, write_record

NAMES = ["metric-uniform", "metric-repaired", "widths-repaired"]


@pytest.fixture
def recipe(small):
    return small("search.masks_per_step=4", "repair.method=least-squares", "repair.windows=8")


def test_variants_have_different_names_and_recipes(recipe) -> None:
    variants = variants_of(recipe)
    assert len({variant.recipe for variant in variants}) == len({variant.name for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    ("metric", "method", "in_ablation"),
    [
        ("obs", "least-squares", {"sparsegpt", "sparsegpt-uniform"}),
        ("wanda-sp", "least-squares", {"wanda-sp", "wanda-sp-uniform"}),
        ("flap", "bias", {"flap-uniform"}),
    ],
)
def test_a_method_that_equals_a_row_of_the_ablation_has_no_row(small, metric, method, in_ablation) -> None:
    names = {variant.name for variant in variants_of(small(f"scores.metric={metric}", f"repair.method={method}"))}
    methods = {"random", "magnitude", "wanda-sp", "flap", "llm-pruner", "sparsegpt"}
    assert (methods | {f"{name}-uniform" for name in methods}) - names == in_ablation


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["repair.method=sublayer", "search.objective=loss"],
            {"widths-least-squares": ("least-squares", "loss"), "widths-kl": ("sublayer", "kl")},
        ),
        (["repair.method=least-squares", "search.objective=loss"], {"widths-kl": ("least-squares", "kl")}),
        (
            ["repair.method=sublayer", "search.objective=kl"],
            {"widths-least-squares": ("least-squares", "kl"), "widths-loss": ("sublayer", "loss")},
        ),
    ],
)
def test_the_ablation_has_a_row_for_another_repair_and_another_objective(small, overrides, expected) -> None:
    rows = {variant.name: variant.recipe for variant in variants_of(small(*overrides))}
    others = {"widths-least-squares", "widths-kl", "widths-loss"} & rows.keys()
    assert {name: (rows[name].repair.method, rows[name].search.objective) for name in others} == expected
    assert {rows[name].search.policy for name in others} == {"widths"}


def test_flap_and_llm_pruner_run_as_published(small) -> None:
    """FLAP: one threshold for standardised scores. LLM-Pruner: ten examples, one width, first and last layers whole."""
    rows = {variant.name: variant.recipe for variant in variants_of(small("budget.sparsity=0.3"))}
    assert (rows["flap"].scores.metric, rows["flap"].start.mapping) == ("flap-adaptive", "global-rank")
    pruner = rows["llm-pruner"]
    assert (pruner.scores.windows, pruner.scores.seqlen, pruner.start.mapping) == (10, 64, "rank")
    assert (pruner.budget.keep_first, pruner.budget.keep_last) == (0.125, 0.0625)
    half = {variant.name: variant.recipe for variant in variants_of(small("budget.sparsity=0.5"))}["llm-pruner"]
    assert (half.budget.keep_first, half.budget.keep_last) == (0.09375, 0.03125)


def test_searches_with_the_same_repair_share_one_width_table(recipe, tmp_path, monkeypatch) -> None:
    solved = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        solved.append(kwargs["solve"])
        return solve_layers(*args, **kwargs)

    monkeypatch.setattr(table, "solve_layers", counted)
    names = ["error-widths-repaired", "widths", "widths-repaired"]
    compared = compare(recipe, tmp_path / "shared", seeds=[0, 1], only=names, max_windows=2)
    assert sorted(solved) == [False, True]
    assert not (tmp_path / "shared" / TABLES_FOLDER).exists()

    compare(recipe, tmp_path / "alone", only=["widths-repaired"], max_windows=2)
    shared, alone = (tmp_path / name / "widths-repaired" / "seed-0" / DECISION_MASKS for name in ("shared", "alone"))
    assert shared.read_bytes() == alone.read_bytes()
    assert [len(row["runs"]) for row in compared["rows"]] == [1, 1, 2, 2]


def test_variants_share_scores_only_if_they_read_the_same_text(small, tmp_path) -> None:
    """LLM-Pruner's ten examples must not score the other rows of a recipe with its metric, nor the other way round."""
    recipe = small("scores.metric=taylor", "repair.method=none")
    compare(recipe, tmp_path, only=["llm-pruner-uniform", "llm-pruner", "metric"], max_windows=2)
    scores = {name: (tmp_path / name / "seed-0" / SCORES_FILE).read_bytes() for name in ("llm-pruner", "metric")}
    assert scores["llm-pruner"] == (tmp_path / "llm-pruner-uniform" / "seed-0" / SCORES_FILE).read_bytes()
    assert scores["llm-pruner"] != scores["metric"]
    assert len(list((tmp_path / SCORES_FOLDER).iterdir())) == 2


def test_the_seconds_of_a_search_are_kept_if_its_evaluation_is_interrupted(recipe, tmp_path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    compare(recipe, tmp_path, only=["metric"], max_windows=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_measure", interrupted)
        compare(recipe, tmp_path, only=["metric-repaired"], max_windows=2)
    row = compare(recipe, tmp_path, only=["metric-repaired"], max_windows=2)["rows"][-1]
    searched = Decision.load(tmp_path / "metric-repaired" / "seed-0")
    assert row["runs"][0]["seconds"] == sum(searched.phases.values()) > 0


def test_a_cell_shows_the_mean_and_the_standard_deviation_over_the_seeds() -> None:
    def row(name: str, *values: float) -> dict[str, Any]:
        cell = {"corpus": "demo", "seqlen": 32, "bos": False}
        counts = {"forward_passes": 4, "calibration_forward_passes": 2, "seconds": 1.0}
        runs = [{"perplexity": [cell | {"ppl": value}]} for value in values]
        mean = {"perplexity": [cell | {"ppl": statistics.fmean(values)}]} | counts
        return {"name": name, "shows": "", "runs": runs, "mean": mean}

    _, (one, several) = job.cells({"rows": [row("dense", 1500.0), row("widths", 9.0, 10.0, 11.5)]})
    assert (one[2], several[2]) == ("1,500.00", "10.17 ± 1.26")


def test_a_comparison_writes_a_table_and_repeats_no_finished_run(recipe, tmp_path, monkeypatch) -> None:
    result = compare(recipe, tmp_path, seeds=[0, 1], only=NAMES, max_windows=2)
    assert [row["name"] for row in result["rows"]] == ["dense", *NAMES]
    assert [len(row["runs"]) for row in result["rows"]] == [1, 1, 1, 2]
    assert {run["max_windows"] for row in result["rows"] for run in row["runs"]} == {result["max_windows"]} == {2}
    assert read_record(tmp_path / COMPARISON_RECORD) == result
    searched = result["rows"][-1]
    perplexities = [run["perplexity"][0]["ppl"] for run in searched["runs"]]
    assert searched["mean"]["perplexity"][0]["ppl"] == pytest.approx(sum(perplexities) / 2)
    assert all(run["parameters"] < result["rows"][0]["runs"][0]["parameters"] for run in searched["runs"])
    lines = (tmp_path / COMPARISON_TABLE).read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4:]] == ["dense", *NAMES]

    def fail(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(job, "search", fail)
    monkeypatch.setattr(job, "open_target", fail)
    assert compare(recipe, tmp_path, seeds=[0, 1], only=NAMES, max_windows=2) == result
    assert compare(recipe, tmp_path, seeds=[0, 1], only=NAMES[:1], max_windows=2) == result  # the other rows are kept
    with refused("sparsity is 0.5, not 0.25", "--out"):
        other = replace(recipe, budget=replace(recipe.budget, sparsity=0.25))
        compare(other, tmp_path, seeds=[0, 1], only=NAMES, max_windows=2)
    with refused("--max-windows 2", "3"):
        compare(recipe, tmp_path, only=NAMES, max_windows=3)


@pytest.fixture
def compared(small, tmp_path):
    """Compare once on a text file, and return a function that compares again with overrides of the recipe."""
    for name, content in (("tales", "The king was glad. "), ("other", "The queen was sad. ")):
        (tmp_path / f"{name}.txt").write_text(content * 50)

    def again(*overrides: str, only: str = "metric") -> None:
        recipe = small(f"evaluation.corpora=[tales={tmp_path / 'tales.txt'}]", "evaluation.seqlen=[32]", *overrides)
        compare(recipe, tmp_path / "table", only=[only], max_windows=2)

    again()
    return again


def test_measurements_with_other_conditions_are_refused(compared, tmp_path) -> None:
    dense = str(tmp_path / "table" / "dense" / MEASURED_FILE)
    tales, other = tmp_path / "tales.txt", tmp_path / "other.txt"
    with refused(dense, "evaluation.seqlen [32], not [64]"):
        compared("evaluation.seqlen=[64]")
    with refused(dense, "evaluation.bos auto, not true"):
        compared("evaluation.bos=true")
    with refused(dense, "another version of the text tales"):
        compared(f"evaluation.corpora=[tales={other}]")
    with refused(dense, "[tales], not [demo]"):
        compared("evaluation.corpora=[demo]")
    with refused(dense, "[tales], not [tales, demo]"):
        compared(f"evaluation.corpora=[tales={tales},demo]")
    compared("device=cpu")
    tales.write_text("Another tale. " * 50)
    with refused(dense, "another version of the text tales"):
        compared()


@pytest.mark.parametrize("only", ["metric", "metric-uniform"])
def test_a_changed_recipe_is_refused_even_if_its_row_is_not_selected(only: str, compared, tmp_path) -> None:
    with refused(str(tmp_path / "table" / "metric" / "seed-0"), "start.temperature: 0.3 → 0.9"):
        compared("start.temperature=0.9", only=only)
    with refused(str(tmp_path / "table" / "metric" / "seed-0"), "calibration.bos: auto → true"):
        compared("calibration.bos=true", only=only)


def test_every_row_of_a_comparison_has_the_bos_of_its_recipe(recipe, tmp_path) -> None:
    with_bos = replace(recipe, evaluation=replace(recipe.evaluation, bos=True))
    table = compare(with_bos, tmp_path, only=["metric"], max_windows=2)
    assert {cell["bos"] for row in table["rows"] for run in row["runs"] for cell in run["perplexity"]} == {True}
    assert "demo PPL, 128 tokens, with BOS" in (tmp_path / COMPARISON_TABLE).read_text()


@pytest.mark.parametrize("row", ["dense", "metric/seed-0"])
@pytest.mark.parametrize(
    ("condition", "recorded", "fact"),
    [
        ("dtype", "bfloat16", "dtype bfloat16, not float32"),
        ("seqlen", [64], "evaluation.seqlen [64], not [32]"),
        ("fingerprint", "0" * 64, "the model's files changed"),
    ],
)
def test_every_row_is_checked_for_its_conditions(row, condition, recorded, fact, compared, tmp_path) -> None:
    path = tmp_path / "table" / row / MEASURED_FILE
    record = read_record(path)
    write_record(path, record | {"conditions": record["conditions"] | {condition: recorded}})
    with refused(str(path), fact):
        compared()


@pytest.mark.parametrize("conditions", [None, {}, {"dtype": "float32"}])
def test_measurements_without_conditions_are_refused_as_damaged(conditions, compared, tmp_path) -> None:
    path = tmp_path / "table" / "metric" / "seed-0" / MEASURED_FILE
    write_record(path, read_record(path) | {"conditions": conditions})
    with refused(str(path), "damaged"):
        compared()


def test_conditions_are_read_back_and_the_order_of_texts_matters(tmp_path) -> None:
    conditions = EvaluationConditions("f0", [["tales", "1"], ["tales", "2"]], [32], "auto", "float32", None)
    conditions.write(tmp_path / MEASURED_FILE, {"parameters": 7})
    assert conditions.read(tmp_path / MEASURED_FILE) == {"parameters": 7, "max_windows": None}
    with refused("another version of the text tales"):
        replace(conditions, texts=conditions.texts[::-1]).read(tmp_path / MEASURED_FILE)
    with refused("without --max-windows"):
        replace(conditions, max_windows=3).read(tmp_path / MEASURED_FILE)


def test_an_unknown_variant_is_refused_with_the_known_names(recipe) -> None:
    with refused("--only metrics", "metric or metric-start", "random-uniform"):
        select_variants(recipe, ["metrics"])
