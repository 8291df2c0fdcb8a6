"""The comparison: every variant once, nothing twice, and a table people and programs can read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgprune_cli.errors import UserError
from pgprune_cli.jobs import compare as job
from pgprune_cli.jobs.compare import Settings, compare, variants_of
from pgprune_cli.run.layout import COMPARISON_RECORD, COMPARISON_TABLE, MEASURED_FILE
from pgprune_cli.storage.records import read_record, write_record

NAMES = ["metric-uniform", "metric-repaired", "widths-repaired"]


@pytest.fixture
def recipe(small):
    return small("search.masks_per_step=4", "repair.method=least-squares", "repair.windows=8")


def test_every_variant_differs_from_every_other(recipe) -> None:
    variants = variants_of(recipe)
    assert len({variant.recipe for variant in variants}) == len({variant.name for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    ("metric", "method", "own"),
    [
        ("obs", "least-squares", {"sparsegpt", "sparsegpt-uniform"}),
        ("wanda-sp", "least-squares", {"wanda-sp", "wanda-sp-uniform"}),
        ("flap", "bias", {"flap", "flap-uniform"}),
    ],
)
def test_every_method_has_its_rows_once(small, metric, method, own) -> None:
    names = {variant.name for variant in variants_of(small(f"scores.metric={metric}", f"repair.method={method}"))}
    methods = {"random", "magnitude", "wanda-sp", "flap", "llm-pruner", "sparsegpt"}
    wanted = methods | {f"{name}-uniform" for name in methods}
    assert wanted - names == own  # those are the ablation's own rows


def test_a_comparison_is_a_table_and_goes_on_where_it_was(recipe, tmp_path, monkeypatch) -> None:
    table = compare(recipe, tmp_path, [0, 1], NAMES, limit=2)
    assert [row["name"] for row in table["rows"]] == ["dense", *NAMES]
    assert [len(row["runs"]) for row in table["rows"]] == [1, 1, 1, 2]
    assert read_record(tmp_path / COMPARISON_RECORD) == table
    searched = table["rows"][-1]
    pair = [run["perplexity"][0]["ppl"] for run in searched["runs"]]
    assert searched["mean"]["perplexity"][0]["ppl"] == pytest.approx(sum(pair) / 2)
    assert all(run["parameters"] < table["rows"][0]["runs"][0]["parameters"] for run in searched["runs"])
    lines = (tmp_path / COMPARISON_TABLE).read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4:]] == ["dense", *NAMES]

    def never(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(job, "search", never)
    monkeypatch.setattr(job, "open_target", never)
    assert compare(recipe, tmp_path, [0, 1], NAMES, limit=2) == table
    few = compare(recipe, tmp_path, [0, 1], NAMES[:1], limit=2)
    assert few == table  # the rows measured earlier stay, in their places
    with pytest.raises(UserError, match=r"its sparsity is 0\.5, not 0\.25; give another --out"):
        other = replace(recipe, budget=replace(recipe.budget, sparsity=0.25))
        compare(other, tmp_path, [0, 1], NAMES, limit=2)
    with pytest.raises(UserError, match="measured with --max-windows 2"):
        compare(recipe, tmp_path, [0], NAMES, limit=3)


def test_what_was_measured_with_other_settings_is_refused(small, tmp_path) -> None:
    texts = tmp_path / "tales.txt", tmp_path / "other.txt"
    for text, content in zip(texts, ("The king was glad. ", "The queen was sad. "), strict=True):
        text.write_text(content * 50)

    def again(*overrides: str, only: str = "metric") -> str:
        recipe = small(f"evaluation.corpora=[tales={texts[0]}]", "evaluation.seqlen=[32]", *overrides)
        try:
            compare(recipe, tmp_path / "table", [0], [only], limit=2)
        except UserError as refused:
            return str(refused)
        return ""

    assert again() == ""
    dense = tmp_path / "table" / "dense" / MEASURED_FILE
    said = f"{dense}: measured with {{}}; give the same, or another --out"
    assert again("evaluation.seqlen=[64]") == said.format("evaluation.seqlen [32], not [64]")
    assert again(f"evaluation.corpora=[tales={texts[1]}]") == said.format("another text of tales")
    assert again("evaluation.corpora=[demo]") == said.format("evaluation.corpora [tales], not [demo]")
    two = [f"tales={texts[0]}", "demo"]
    assert again(f"evaluation.corpora=[{two[0]},{two[1]}]") == said.format(
        "evaluation.corpora [tales], not [tales, demo]"
    )
    assert again("device=cpu") == ""
    for only in ("metric", "metric-uniform"):  # measured, and beside it in the table
        run = tmp_path / "table" / "metric" / "seed-0"
        changed = f"{run}: belongs to another recipe (temperature: 0.3 → temperature: 0.9); "
        assert again("start.temperature=0.9", only=only).startswith(changed)
    texts[0].write_text("Another tale. " * 50)
    assert again() == said.format("another text of tales")
    texts[0].write_text("The king was glad. " * 50)
    whole = read_record(dense)
    write_record(dense, whole | {"settings": whole["settings"] | {"dtype": "bfloat16"}})
    assert again() == said.format("dtype bfloat16, not float32")
    write_record(dense, whole)
    row = tmp_path / "table" / "metric" / "seed-0" / MEASURED_FILE
    measured = read_record(row)
    write_record(row, measured | {"settings": measured["settings"] | {"seqlen": [64]}})
    assert again() == said.replace(str(dense), str(row)).format("evaluation.seqlen [64], not [32]")
    del measured["settings"]  # of before they were recorded
    write_record(row, measured)
    assert again() == ""


def test_texts_of_one_name_that_changed_places_are_other_texts(tmp_path) -> None:
    settings = Settings([["tales", "1"], ["tales", "2"]], [32], "float32", None)
    settings.write(tmp_path / MEASURED_FILE, {"parameters": 7})
    assert settings.read(tmp_path / MEASURED_FILE) == {"parameters": 7, "limit": None}
    with pytest.raises(UserError, match="measured with another text of tales; give the same"):
        replace(settings, texts=settings.texts[::-1]).read(tmp_path / MEASURED_FILE)


def test_a_name_that_is_no_variants_is_refused(recipe, tmp_path) -> None:
    said = r"^--only metrics: no such variant, did you mean metric or metric-start\? expected one of random-uniform, "
    with pytest.raises(UserError, match=said):
        compare(recipe, tmp_path, [0], ["metrics"], None)
