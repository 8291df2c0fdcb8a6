"""The list of shipped recipes: one line per model, and every recipe can be told from it."""

from __future__ import annotations

from pgprune_cli.recipe.listing import groups, listing
from pgprune_cli.recipe.reader import name_of, shipped


def test_groups_hold_every_shipped_recipe_once() -> None:
    names = [f"{group.stem}-{percent}" for group in groups() for percent in group.sparsities]
    names += [group.stem for group in groups() if not group.sparsities]
    assert sorted(names) == sorted(map(name_of, shipped()))


def test_listing_has_one_line_per_model_with_its_size() -> None:
    lines = listing().splitlines()
    line = next(line for line in lines if line.startswith("qwen3-0.6b-"))
    assert line.split("  ")[0] == "qwen3-0.6b-20, -30, -50"
    assert "Qwen/Qwen3-0.6B-Base" in line and "596 million" in line
    assert sum("LLaMA-2-7B" in line for line in lines) == 2  # the second has the paper's settings


def test_listing_names_the_demo_and_puts_the_paper_last() -> None:
    lines = listing().splitlines()
    starts = [line.partition(" ")[0] for line in lines]
    assert "demo" in starts
    paper = [line.startswith("paper/") for line in lines]
    assert paper[-1] and paper == sorted(paper)


def test_groups_are_sorted_by_the_numbers_in_their_names() -> None:
    stems = [group.stem for group in groups()]
    assert stems.index("llama2-7b") < stems.index("llama2-13b")
    assert stems.index("qwen3-8b") < stems.index("qwen3-30b-a3b")
