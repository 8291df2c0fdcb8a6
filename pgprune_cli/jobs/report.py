"""report: write one HTML page about runs, finished or not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.report.gather import Run, read_runs
from pgprune_cli.report.recoveries import Recovery
from pgprune_cli.run.layout import REPORT_FILE
from pgprune_cli.storage.atomic import write_bytes


def report(
    directories: Sequence[Path], out: Path | None = None, watch: int | None = None
) -> Iterator[list[Run | Recovery]]:
    """Write the page to `target(directories, out)`, and yield the runs that it shows.

    With `watch`, the page is written again every `watch` seconds until all runs are finished. Raises UserError as
    `read_run` does, and if the packages that draw are not installed.
    """
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError(f"report: a package is missing ({error}). Install it: pip install 'pgprune[report]'") from None
    from pgprune_cli.report.page import page

    while True:
        runs = read_runs(directories)
        reload_after = watch if not all(run.is_finished for run in runs) else None
        write_bytes(target(directories, out), page(runs, reload_after).encode())
        yield runs
        if reload_after is None:
            return
        time.sleep(reload_after)


def target(directories: Sequence[Path], out: Path | None) -> Path:
    """Return the path of the page: `out`, or report.html in the run or, for several runs, in the working directory.

    Raises UserError if `out` is a directory.
    """
    if out is not None and out.is_dir():
        raise UserError(f"{out}: a directory. Name the file to write with --out, such as {out / REPORT_FILE}.")
    if out is not None:
        return out
    return directories[0] / REPORT_FILE if len(directories) == 1 else Path(REPORT_FILE)
