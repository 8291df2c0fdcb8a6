"""What is suggested in place of a name that does not exist."""

from __future__ import annotations

import pytest

from pgprune_cli.console.suggest import either, near, nearest

RUNS = [f"{model}-{sparsity}" for model in ("llama2-7b", "small-135m") for sparsity in (20, 30, 50)]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("small-135m-30", ["small-135m-30", "small-135m-20", "small-135m-50"]),
        ("small-30", ["small-135m-30", "small-135m-20", "small-135m-50"]),
        ("small-50", ["small-135m-50", "small-135m-20", "small-135m-30"]),
        ("small-135m", ["small-135m-20", "small-135m-30", "small-135m-50"]),
        ("lama2-7b-50", ["llama2-7b-50", "llama2-7b-20", "llama2-7b-30"]),
        ("nothing", []),
    ],
)
@pytest.mark.parametrize("names", [RUNS, RUNS[::-1]])
def test_the_nearest_comes_first(name: str, meant: list[str], names: list[str]) -> None:
    actual = near(name, names, most=3)
    assert sorted(actual) == sorted(meant)
    assert actual[:1] == (meant[:1] if name != "small-135m" else [next(word for word in names if word in meant)])
    assert near(name, names) == actual[:1]


def test_it_ends_a_line_or_is_nothing() -> None:
    assert nearest("demos", ["demo", "other"]) == ", did you mean demo?"
    assert nearest("demos", []) == nearest("x" * 10**6, ["demo"]) == ""
    assert [either(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
