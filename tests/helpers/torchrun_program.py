"""The program that torchrun runs in test_distributed.py: pgprune, with an accident to rank 1 in the first start.

    torchrun … torchrun_program.py ACCIDENT STEP search RECIPE --out RUN …

The accident comes after step STEP on all ranks, before its losses and its checkpoint are written, or, if STEP is
`repair`, before the first fit of a block of layer 1. ACCIDENT is
`exception`, `wait` (rank 1 says so in a file and does nothing until it is killed), `none` or the name of a signal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from pathlib import Path

from pgprune_cli import distributed
from pgprune_cli.cli import program
from pgprune_cli.repair.sublayer import SublayerFit
from pgprune_cli.repair.training import Weights
from pgprune_cli.search import loop as search_loop

POLL_INTERVAL = 0.02

WAITING = "rank-1-waits"
"""The file in the run directory that says that rank 1 waits."""


def order_the_restart(run: Path, rank: str) -> None:
    """Let rank 0 of a restart begin only once rank 1 has met what the first start left in torchrun's store."""
    marker = run / "rank-1-has-polled"
    if rank == "0":
        while not marker.exists():
            time.sleep(POLL_INTERVAL)
        marker.unlink()
        return

    def sleep(seconds: float) -> None:  # between two looks at the store
        distributed.time = time
        marker.touch()
        time.sleep(seconds)

    distributed.time = types.SimpleNamespace(sleep=sleep)


def main() -> None:
    """Run pgprune with the arguments after ACCIDENT and STEP."""
    accident, place = sys.argv[1:3]
    del sys.argv[1:3]
    rank, is_restart = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    if is_restart and os.environ["WORLD_SIZE"] != "1":
        order_the_restart(Path(sys.argv[sys.argv.index("--out") + 1]), rank)
    take_step, solve = search_loop._take_step, SublayerFit.solve

    def reach(here: str) -> None:
        if here != place or rank != "1" or is_restart or accident == "none":
            return
        if accident == "exception":
            raise ArithmeticError("an accident")
        if accident == "wait":
            (Path(sys.argv[sys.argv.index("--out") + 1]) / WAITING).touch()
            signal.pause()
        os.kill(os.getpid(), getattr(signal, accident))

    def take_step_and_reach(problem: search_loop.Problem, loop: search_loop.LoopState) -> search_loop.Row:
        row = take_step(problem, loop)
        reach(str(loop.step))
        return row

    def reach_and_solve(fit: SublayerFit, start: Weights) -> Weights:
        if fit.runner.index == 1:
            reach("repair")
        return solve(fit, start)

    search_loop._take_step, SublayerFit.solve = take_step_and_reach, reach_and_solve
    program.main()


if __name__ == "__main__":
    main()
