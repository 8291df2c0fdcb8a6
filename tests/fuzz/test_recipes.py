"""Recipes: any bytes, any YAML, and shipped recipes with damage."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from helpers.inputs import accepted_or_refused, damaged, examples, write
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import _KINDS, dump, find, load, shipped, summary

SHIPPED = [path.read_bytes() for path in (find("demo"), find("paper/llama2-7b-50"), find("demo").parent / "_base.yaml")]
KEYS = [
    "model",
    "extends",
    "budget",
    "search",
    "forward_passes",
    "sparsity",
    "units",
    "families",
    "calibration",
    "corpus",
]
SYNTAX = [": ", ":", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "'", '"', "#", "&a", "*a", "!!int", "|", ">", "---"]
SYNTAX += ["...", "?", "%YAML 9.9\n", "<<", "\t", "\0", "\x85"]
TOKENS = [*KEYS, "seqlen", "demo", "_base", *SYNTAX, "0x1F", "1e999", "9" * 5000, ".nan", "~", "yes", "1:30"]

ASSIGNED = st.tuples(st.sampled_from(sorted(_KINDS)), st.sampled_from(TOKENS), st.sampled_from(["", *TOKENS])).map(
    lambda parts: f"{parts[0]}={parts[1]}{parts[2]}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def read(folder: Path, content: bytes, kind: str) -> None:
    path = write(folder / "x.yaml", content)
    with accepted_or_refused(kind):
        recipe = load(path)
        assert load(write(folder / "again.yaml", dump(recipe).encode())) == recipe
    with suppress(UserError):
        summary(path)


@examples(150)
@given(content=st.binary(max_size=400))
def test_any_bytes_are_accepted_or_refused(folder: Path, content: bytes) -> None:
    read(folder, content, "recipes, bytes")


@examples(150)
@given(content=st.lists(st.sampled_from(TOKENS), max_size=40).map("".join))
def test_any_tokens_of_yaml_are_accepted_or_refused(folder: Path, content: str) -> None:
    read(folder, content.encode(), "recipes, words")


@examples(200)
@given(content=st.sampled_from(SHIPPED).flatmap(damaged))
def test_damaged_recipes_are_accepted_or_refused(folder: Path, content: bytes) -> None:
    read(folder, content, "recipes, damaged")


@examples(150)
@given(lines=st.lists(st.sampled_from([line for text in SHIPPED for line in text.decode().splitlines()]), max_size=30))
def test_lines_of_recipes_in_any_order_are_accepted_or_refused(folder: Path, lines: list[str]) -> None:
    read(folder, "\n".join(lines).encode(), "recipes, lines")


@examples(150)
@given(override=st.one_of(st.text(max_size=60), ASSIGNED))
def test_any_override_is_accepted_or_refused(override: str) -> None:
    with accepted_or_refused("recipes, --set"):
        load(find("demo"), [override])


@examples(100)
@given(
    name=st.one_of(
        st.text(max_size=60),
        st.sampled_from(shipped())
        .flatmap(lambda p: damaged(p.name.encode()))
        .map(lambda b: b.decode(errors="replace")),
    )
)
def test_any_recipe_name_is_found_or_refused(name: str) -> None:
    with accepted_or_refused("recipes, names"):
        load(find(name))


@pytest.mark.parametrize("deep", ["[" * 10**5, "a: {" * 10**4, "- " * 10**5, "x" * 10**7, "# x\n" * 10**6])
def test_deep_and_long_recipes_are_accepted_or_refused(deep: str, folder: Path) -> None:
    read(folder, deep.encode(), "recipes, deep")
