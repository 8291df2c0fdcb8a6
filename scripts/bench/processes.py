"""Measure how many seconds each phase of a search takes with one process and with several, in turn.

    python scripts/bench/processes.py RECIPE [--set KEY=VALUE …] [--processes 2] [--repeats 3]

Each search is `pgprune search` under torchrun, with one CPU thread per process, in a directory of its own. Their
results must be the same bit for bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from subject import table

from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, REPAIR_FILE
from pgprune_cli.storage.records import read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            runs = {count: Path(folder, f"{repeat}-{count}") for count in (1, options.processes)}
            one, several = (phases(options, run, count) for count, run in runs.items())
            if len({result(run) for run in runs.values()}) > 1:
                sys.exit("the results differ")
            for phase in one:
                ratios.setdefault(phase, []).append(one[phase] / max(several[phase], 1e-9))
            print({phase: f"{one[phase]:.1f} s, {several[phase]:.1f} s" for phase in one}, flush=True)
    rows = [
        (phase, f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        for phase, found in ratios.items()
    ]
    table(["phase", f"one process over {options.processes}"], rows)


def phases(options: argparse.Namespace, run: Path, processes: int) -> dict[str, float]:
    """Run the search, and return its seconds by phase."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    overrides = [word for override in options.overrides for word in ("--set", override)]
    search = ["-m", "pgprune_cli", "search", options.recipe, "--out", str(run), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *search], check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds: dict[str, float] = read_record(run / DECISION_RECORD)["phases"]
    return seconds


def result(run: Path) -> tuple[bytes, bytes]:
    """Return the bits of what a search has written."""
    repair = run / REPAIR_FILE
    return (run / DECISION_MASKS).read_bytes(), repair.read_bytes() if repair.exists() else b""


if __name__ == "__main__":
    main()
