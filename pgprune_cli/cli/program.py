"""The command line: its commands, and the exit code of each error."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pgprune_cli import __version__
from pgprune_cli.cli import (
    compare,
    convert,
    doctor,
    evaluate,
    export,
    init_scores,
    recipes,
    recover,
    report,
    runs,
    search,
    verify,
)
from pgprune_cli.cli.complaints import complain, loop_fault, memory_fault, usage_fault
from pgprune_cli.cli.options import examples
from pgprune_cli.cli.stopping import stoppable
from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.errors import ExitCode, RunError, UserError, advice_on
from pgprune_cli.model.allocator import keep_freed_memory

app = typer.Typer(
    help="Prune language models structurally: search for the heads and FFN channels to keep, with forward passes only.",
    epilog=examples("search demo", "export runs/demo", "eval models/demo --ppl demo --seqlen 128"),
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(epilog=init_scores.EXAMPLES)(init_scores.init_scores)
app.command(epilog=search.EXAMPLES)(search.search)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=recover.EXAMPLES)(recover.recover)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=report.EXAMPLES)(report.report)
app.command(epilog=runs.EXAMPLES)(runs.runs)
app.add_typer(recipes.recipes_app, name="recipes")
app.command(epilog=verify.EXAMPLES)(verify.verify)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)

DISTRIBUTED = ("search", "recover")
"""The commands that several processes can run together under torchrun."""


def _print_version(requested: bool) -> None:
    if requested:
        print(f"pgprune {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if ranks_from_environment().world_size > 1 and context.invoked_subcommand not in DISTRIBUTED:
        raise UserError(
            f"{context.invoked_subcommand}: runs in one process. Start it without torchrun, which only "
            f"{' and '.join(DISTRIBUTED)} support."
        )


def _replace_closed_streams() -> None:
    """Send what is written to a stream that the caller closed (`2>&-`) to /dev/null: Python leaves it None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (for as long as it runs)


def _escape_what_stdout_cannot_encode() -> None:
    """Let stdout escape characters that its encoding lacks, as stderr does: a container's may be ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> NoReturn:
    """Run the `pgprune` program and exit with its exit code."""
    code: int = ExitCode.OK
    _replace_closed_streams()
    _escape_what_stdout_cannot_encode()
    keep_freed_memory()
    try:
        with stoppable():
            code = app(prog_name="pgprune", standalone_mode=False) or ExitCode.OK
    except UserError as error:
        complain(str(error))
        code = ExitCode.BAD_INPUT
    except RunError as error:
        complain(str(error))
        code = ExitCode.FAILED
    except OSError as error:
        complain(f"{error.filename or 'a file or standard output'}: {error.strerror or error}{advice_on(error)}")
        code = ExitCode.BAD_INPUT if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else ExitCode.FAILED
    except Exception as error:
        usage, loop, memory = usage_fault(error, typer.main.get_command(app)), loop_fault(error), memory_fault(error)
        if usage is None and loop is None and memory is None:  # a bug: show its traceback
            raise
        complain(usage or loop or memory or "")
        code = ExitCode.FAILED if memory else ExitCode.BAD_INPUT
    sys.exit(code)


if __name__ == "__main__":
    main()
