"""What was measured of the decision of a run: the names of the files, and which of them counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pgprune_cli.run.layout import EVALUATION_FILE, MEASURED_FILE
from pgprune_cli.storage.atomic import read_record


def read_measured(run: Path) -> dict[str, Any] | None:
    """The object that `pgprune eval --json` printed, or of a comparison's run its perplexities; None without either.

    Raises UserError for a damaged file.
    """
    found = [run / name for name in (EVALUATION_FILE, MEASURED_FILE) if (run / name).exists()]
    return read_record(found[0]) if found else None
