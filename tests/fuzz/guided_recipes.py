"""Recipes made by atheris, which sees which lines of the reader an input reaches and builds on those that reach more.

    python tests/fuzz/guided_recipes.py -max_total_time=60

The options are those of libFuzzer. `make fuzz` runs this if atheris is installed, which not every platform has.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["pgprune_cli.recipe.reader", "pgprune_cli.recipe.strict_yaml", "yaml"]):
    from pgprune_cli.recipe.reader import find, load

from helpers.inputs import accepted_or_refused, write


def main() -> None:
    """Start from shipped recipes and run until libFuzzer stops."""
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        for name in ("demo", "llama2-7b-50", "paper/llama2-7b-50"):
            write(corpus / name.replace("/", "-"), find(name).read_bytes())

        def one_input(content: bytes) -> None:
            with accepted_or_refused("recipes, guided"):
                load(write(Path(folder) / "x.yaml", content))

        atheris.Setup([*sys.argv, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
