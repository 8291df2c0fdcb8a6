"""pgprune convert: pickled weights as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, Quiet, examples, progress_of
from pgprune_cli.cli.tables import print_result

EXAMPLES = examples("convert lmsys/vicuna-7b-v1.5 models/vicuna-7b")


def convert(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A directory with pytorch_model*.bin files, or a name on the hub.")
    ],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a model with pickled weights to safetensors.

    Other commands read no pickles, because they can run code. The conversion runs none.
    """
    from pgprune_cli.jobs.convert import convert

    files = convert(source, out, progress=progress_of(quiet))
    result = {"model": str(out), "files": [str(path) for path in files]}
    print_result(result, as_json, f"{out}: {len(files)} weight {'file' if len(files) == 1 else 'files'}")
