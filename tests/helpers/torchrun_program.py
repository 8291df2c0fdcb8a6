"""What torchrun runs in test_distributed.py: the program, with an accident to rank 1 of the first start.

    torchrun … ranks.py ACCIDENT STEP search RECIPE …

STEP steps are done then, on all ranks, and what follows them is not: their losses are heard, no checkpoint is written.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from pgprune_cli.cli import program as cli
from pgprune_cli.search import loop as loops


def main() -> None:
    accident, step, start = sys.argv[1], int(sys.argv[2]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    del sys.argv[1:3]
    if start and os.environ["RANK"] == "0":
        time.sleep(3)  # the others find what the first start has left
    original = loops._take_step

    def one_step(problem: loops.Problem, loop: loops.LoopState) -> loops.Row:
        row = original(problem, loop)
        if loop.step == step and os.environ["RANK"] == "1" and not start:
            if accident == "exception":
                raise ArithmeticError("an accident")
            os.kill(os.getpid(), getattr(signal, accident))
        return row

    loops._take_step = one_step
    cli.main()


if __name__ == "__main__":
    main()
