"""Measure what keeping freed memory saves a forward pass on a CPU, and what it takes.

    python scripts/bench/freed_memory.py MODEL [--keep 0.5] [--repeats 10]

Two processes load the model, one as `pgprune` runs and one with the C library's own limits. They run a forward pass in
turn, each while the other waits.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

from subject import arguments, open_evaluator, opened, random_mask, random_tokens, seconds, table

from pgprune_cli.model.allocator import keep_freed_memory

STATES = ("kept", "returned")
"""What happens to freed memory in each of the two processes."""


def work(options: argparse.Namespace) -> None:
    """Answer every line of stdin with the seconds of a forward pass, and the peak memory of the process in MB."""
    if options.worker == "kept":
        keep_freed_memory()
    evaluator = open_evaluator(options)
    tokens, model_mask = random_tokens(evaluator, options), random_mask(evaluator, options.keep)
    for _ in sys.stdin:
        taken = seconds(lambda: evaluator.losses([model_mask], tokens), evaluator.model.device)
        print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def main() -> None:
    parser = arguments(__doc__, repeats=10)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--worker", choices=STATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    opened(options)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    workers = [
        subprocess.Popen([*command, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for state in STATES
    ]
    pairs, memory = [], [0.0, 0.0]
    for _ in range(options.repeats + 1):
        pair = []
        for index, worker in enumerate(workers):
            assert worker.stdin is not None and worker.stdout is not None
            print(file=worker.stdin, flush=True)
            taken, memory[index] = map(float, worker.stdout.readline().split())
            pair.append(taken)
        pairs.append(pair)
    for worker in workers:
        worker.communicate()
    ratios = [kept / returned for kept, returned in pairs[1:]]
    kept, returned = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    headings = ("keep", "kept, seconds", "returned, seconds", "ratio", "least", "greatest", "kept, MB", "returned, MB")
    table(headings, [(options.keep, kept, returned, statistics.median(ratios), min(ratios), max(ratios), *memory)])


if __name__ == "__main__":
    main()
