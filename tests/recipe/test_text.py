"""Resolved recipes as people read them: a comment never contradicts the value beside it."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.recipe.reader import find, load, shipped
from pgprune_cli.recipe.text import annotated, comments


def lines_of(path: Path, *overrides: str) -> dict[str, str]:
    """Return the lines of the annotated recipe by their (undotted) key. Of several, the last one counts."""
    return {line.split(":")[0].strip(): line for line in annotated(load(path, overrides), path).splitlines()}


def test_a_comment_of_the_base_is_left_out_beside_another_value() -> None:
    base, other = lines_of(find("demo")), lines_of(find("demo"), "repair.method=none", "search.evaluate_every=100")
    assert base["method"].startswith("  method: sublayer  # refits every kept weight")
    assert other["method"] == "  method: none"
    assert base["evaluate_every"].startswith("  evaluate_every: 0  # about 8")
    assert other["evaluate_every"] == "  evaluate_every: 100"
    assert base["device"] == "device: cpu"  # the base has auto
    assert base["damping"].endswith(comments()["repair.damping"])  # 1.0e-3 there, 0.001 here
    assert lines_of(find("llama2-7b-50"))["train"] == "  train: lora"


def test_the_comments_of_the_own_file_come_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: demo\nrepair:  # short\n  method: none  # nothing to repair\n  epochs: 3\nseed: 7  # luck\n"
    )
    lines = lines_of(path)
    assert (lines["repair"], lines["method"]) == ("repair:  # short", "  method: none  # nothing to repair")
    assert lines["seed"] == "seed: 7  # luck"
    assert lines["epochs"].endswith(comments()["repair.epochs"])
    assert lines_of(path, "seed=8")["seed"] == "seed: 8"


def test_annotated_recipes_read_back_equal(tmp_path: Path) -> None:
    for path in shipped():
        (tmp_path / "x.yaml").write_text(annotated(load(path), path), encoding="utf-8")
        assert load(tmp_path / "x.yaml") == load(path)
