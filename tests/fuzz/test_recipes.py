"""Recipes: any bytes, and recipes that ship with something changed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from helpers.inputs import damaged, examples, put, told
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import _KINDS, dump, find, load, shipped, summary

SHIPPED = [path.read_bytes() for path in (find("demo"), find("paper/llama2-7b-50"), find("demo").parent / "_base.yaml")]
TOKENS = [
    *(
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
        "seqlen",
    ),
    *(
        "demo",
        "_base",
        ": ",
        ":",
        "\n",
        "\n  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "'",
        '"',
        "#",
        "&a",
        "*a",
        "!!int",
        "|",
        ">",
    ),
    *(
        "---",
        "...",
        "?",
        "%YAML 9.9\n",
        "<<",
        "0x1F",
        "1e999",
        "9" * 5000,
        ".nan",
        "~",
        "yes",
        "1:30",
        "\t",
        "\0",
        "\x85",
    ),
]


ASSIGNED = st.tuples(st.sampled_from(sorted(_KINDS)), st.sampled_from(TOKENS), st.sampled_from(["", *TOKENS])).map(
    lambda parts: f"{parts[0]}={parts[1]}{parts[2]}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def read(folder: Path, content: bytes, kind: str) -> None:
    path = put(folder / "x.yaml", content)
    with told(kind):
        recipe = load(path)
        assert load(put(folder / "again.yaml", dump(recipe).encode())) == recipe
    with suppress(UserError):
        summary(path)


@examples(150)
@given(content=st.binary(max_size=400))
def test_bytes(folder: Path, content: bytes) -> None:
    read(folder, content, "recipes, bytes")


@examples(150)
@given(content=st.lists(st.sampled_from(TOKENS), max_size=40).map("".join))
def test_words_of_the_language(folder: Path, content: str) -> None:
    read(folder, content.encode(), "recipes, words")


@examples(200)
@given(content=st.sampled_from(SHIPPED).flatmap(damaged))
def test_recipes_with_damage(folder: Path, content: bytes) -> None:
    read(folder, content, "recipes, damaged")


@examples(150)
@given(lines=st.lists(st.sampled_from([line for text in SHIPPED for line in text.decode().splitlines()]), max_size=30))
def test_lines_of_recipes_in_any_order(folder: Path, lines: list[str]) -> None:
    read(folder, "\n".join(lines).encode(), "recipes, lines")


@examples(150)
@given(override=st.one_of(st.text(max_size=60), ASSIGNED))
def test_overrides(override: str) -> None:
    with told("recipes, --set"):
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
def test_names(name: str) -> None:
    with told("recipes, names"):
        load(find(name))


@pytest.mark.parametrize("deep", ["[" * 10**5, "a: {" * 10**4, "- " * 10**5, "x" * 10**7, "# x\n" * 10**6])
def test_deep_and_long(deep: str, folder: Path) -> None:
    read(folder, deep.encode(), "recipes, deep")
