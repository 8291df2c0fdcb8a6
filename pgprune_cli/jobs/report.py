"""report: one HTML file about runs of a search, finished or not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.report.gather import Run, read_runs
from pgprune_cli.run.layout import REPORT_FILE
from pgprune_cli.storage.atomic import write_bytes


def report(directories: Sequence[Path], out: Path | None = None, watch: int | None = None) -> Iterator[list[Run]]:
    """Writes the report, to `out` or as `target` says, and gives the runs that it is about.

    With `watch` it does so again every so many seconds until all runs are finished. Raises UserError as `read_run`
    does, and where what draws is not installed.
    """
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError(f"report needs the extra: pip install 'pgprune[report]' ({error})") from None
    from pgprune_cli.report.page import page

    while True:
        runs = read_runs(directories)
        again = watch is not None and any(run.decision is None for run in runs)
        write_bytes(target(directories, out), page(runs, watch if again else None).encode())
        yield runs
        if not again:
            return
        assert watch is not None, "there is an interval wherever there is a next time"
        time.sleep(watch)


def target(directories: Sequence[Path], out: Path | None) -> Path:
    """Where the report goes: into the run, or beside where one is where it is about several."""
    if out is not None:
        return out
    return directories[0] / REPORT_FILE if len(directories) == 1 else Path(REPORT_FILE)
