"""Recipes made by atheris, which sees what lines of the reader an input reaches and goes on from those that reach more.

    python tests/fuzz/guided_recipes.py -max_total_time=60

Any option is libFuzzer's. `make fuzz` runs it where atheris is installed, which has no wheels for every platform.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["pgprune_cli.recipe.reader", "pgprune_cli.recipe.strict_yaml", "yaml"]):
    from pgprune_cli.recipe.reader import find, load

from helpers.inputs import put, told


def main() -> None:
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        for name in ("demo", "llama2-7b-50", "paper/llama2-7b-50"):
            put(corpus / name.replace("/", "-"), find(name).read_bytes())

        def one_input(content: bytes) -> None:
            with told("recipes, guided"):
                load(put(Path(folder) / "x.yaml", content))

        atheris.Setup([*sys.argv, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
