"""Measure what keeping freed memory saves a forward pass on a CPU, and what it takes.

    python scripts/bench/freed_memory.py MODEL [--keep 0.5] [--repeats 10]

Two processes load the model, one as `pgprune` runs and one with the C library's own limits. They run a forward pass in
turn, each while the other waits.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from subject import arguments, headline, in_turn, open_evaluator, random_mask, random_tokens, table

from pgprune_cli.model.allocator import keep_freed_memory

CPU = torch.device("cpu")


class Worker:
    """A process that runs forward passes, with freed memory `kept` or `returned`. memory: its peak so far, in MB."""

    def __init__(self, state: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", state]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = 0.0

    def run(self) -> None:
        """Run one forward pass, and wait for it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        self.memory = float(self.process.stdout.readline())


def work(options: argparse.Namespace) -> None:
    """Answer every line of stdin with the peak memory of the process in MB, after a forward pass."""
    if options.worker == "kept":
        keep_freed_memory()
    evaluator = open_evaluator(options)
    tokens, model_mask = random_tokens(evaluator, options), random_mask(evaluator, options.keep)
    for _ in sys.stdin:
        evaluator.losses([model_mask], tokens)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def main() -> None:
    parser = arguments(__doc__, repeats=10)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--worker", choices=("kept", "returned"), help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    print(headline(options, CPU), flush=True)
    kept, returned = Worker("kept"), Worker("returned")
    ratio = in_turn(kept.run, returned.run, options.repeats, CPU)
    for worker in (kept, returned):
        worker.process.communicate()
    headings = ("keep", "kept, seconds", "returned, seconds", "ratio", "least", "greatest", "kept, MB", "returned, MB")
    table(headings, [(options.keep, *ratio, kept.memory, returned.memory)])


if __name__ == "__main__":
    main()
