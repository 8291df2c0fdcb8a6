"""Measure what a step of the search costs besides its forward passes, and how many forward passes a second it reaches.

    python scripts/bench/search_step.py MODEL [--policy widths] [--masks-per-step 16] [--keep 0.5] [--repeats 5]

This runs `pgprune search` itself on the given model and the demo's text. Placeholder repairs replace solved ones; they
take the same memory and time in a step. Everything that is not a forward pass counts as outside: sampling, projection,
masks, hooks, history, progress, checkpoints. A dense forward pass of the same tokens is timed after every step. Every
forward pass is waited for, so on a GPU, where the host runs ahead, the share outside is an upper bound.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from subject import arguments, headline, open_evaluator, random_tokens, seconds, table
from torch import Tensor, nn

from pgprune_cli.forward import masked
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.jobs import search
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.prunable import Partitions
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.repair.least_squares import Repaired
from pgprune_cli.repair.width_table import WidthTable, width_step
from pgprune_cli.run.history import Row
from pgprune_cli.search import loop, problem
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.progress import SearchProgress


class Watch:
    """Records the seconds of each step, of its forward passes and of a dense one, and the number of forward passes."""

    def __init__(self, evaluator: Evaluator, tokens: Tensor) -> None:
        self.evaluator, self.tokens = evaluator, tokens
        self.steps: list[tuple[float, float, float, int]] = []
        self.begin()

    def begin(self) -> None:
        """Start the clock of a step."""
        self.began, self.inside, self.forward_passes = time.perf_counter(), 0.0, 0

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Compute and time one loss."""
        losses: list[Tensor] = []
        self.inside += seconds(lambda: losses.append(summed_loss(model, tokens)), self.evaluator.model.device)
        self.forward_passes += 1
        return losses[0]

    def end(self) -> None:
        """Record the step that has ended, and time a dense forward pass."""
        taken = time.perf_counter() - self.began
        dense = seconds(lambda: summed_loss(self.evaluator.model.module, self.tokens), self.evaluator.model.device)
        self.steps.append((taken, self.inside, dense, self.forward_passes))
        self.begin()


def placeholder_table(
    context: SearchContext, ranks: Mapping[tuple[int, str], Tensor], partitions: Partitions, *_: Any
) -> WidthTable:
    """Return a table of evenly rising errors, whose repairs are columns of the dense projections.

    They are stored as a solved table's.
    """
    model = context.model
    blocks = {block.name: block for block in model.family.blocks}
    errors, orders, repaired = {}, {}, {}
    for (index, name), values in ranks.items():
        projection = blocks[name].output_linear(model.layers[index])
        units = len(values)
        orders[index, name] = order = values.argsort(descending=True)
        elements = [0, *partitions[index, name].bincount()[order].cumsum(0).tolist()]  # kept at every width
        errors[index, name] = torch.linspace(1.0, 0.0, units + 1, dtype=torch.float64).square()
        widths = [elements[kept] for kept in range(width_step(units), units, width_step(units))]
        columns = {kept: projection.weight[:, : kept * projection.in_features // elements[-1]] for kept in widths}
        repaired[index, name] = {
            kept: RepairedBlock(weight.T.contiguous().cpu().T, None) for kept, weight in columns.items()
        }
    return WidthTable(errors, orders, repaired)


def watched_steps(evaluator: Evaluator, overrides: list[str], tokens: Tensor) -> list[tuple[float, float, float, int]]:
    """Run the search. Return for every step but the first: its seconds, those of its forward passes and of a dense
    forward pass, and the number of forward passes.
    """
    watch = Watch(evaluator, tokens)

    class TimedProgress(SearchProgress):
        def show(self, row: Row) -> None:
            super().show(row)
            if row.losses:
                watch.end()
            else:  # the start, which is only evaluated
                watch.begin()

    with ExitStack() as patched, tempfile.TemporaryDirectory() as folder:
        patched.enter_context(patch.object(search, "load_prunable", lambda *_: evaluator.model))
        patched.enter_context(patch.object(problem, "solve_table", placeholder_table))
        patched.enter_context(
            patch.object(search, "repair", lambda _, model_mask, *__, **___: Repaired(model_mask, {}))
        )
        patched.enter_context(patch.object(loop, "SearchProgress", TimedProgress))
        patched.enter_context(patch.object(masked, "summed_loss", watch.loss))
        search.search(load(find("demo"), overrides), Path(folder) / "run")
    return watch.steps[1:]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--policy", choices=("widths", "units"), default="widths")
    parser.add_argument("--masks-per-step", type=int, default=16)
    options = parser.parse_args()
    evaluator = open_evaluator(options)
    overrides = [
        f"dtype={options.dtype}",
        f"budget.sparsity={1.0 - options.keep}",
        f"calibration.batch={options.batch}",
        f"calibration.seqlen={options.seqlen}",
        f"calibration.heldout={options.batch}",
        f"search.policy={options.policy}",
        f"search.masks_per_step={options.masks_per_step}",
        f"search.forward_passes={options.masks_per_step * (options.repeats + 1)}",
        "search.objective=loss",
        "scores.metric=magnitude",
    ]
    steps = watched_steps(evaluator, overrides, random_tokens(evaluator, options))
    print(headline(options, evaluator.model.device))
    taken, inside, _, forward_passes = (sum(column) for column in zip(*steps, strict=True))
    outside = [1.0 - inside_seconds / step_seconds for step_seconds, inside_seconds, _, _ in steps]
    end_to_end = [step_seconds / count / dense for step_seconds, _, dense, count in steps]
    table(
        (
            "policy",
            "keep",
            "step s",
            "share outside",
            "least",
            "greatest",
            "forward passes/s",
            "forward pass over dense",
        ),
        [
            (
                options.policy,
                options.keep,
                statistics.median(step_seconds for step_seconds, *_ in steps),
                1.0 - inside / taken,
                min(outside),
                max(outside),
                forward_passes / taken,
                statistics.median(end_to_end),
            )
        ],
    )


if __name__ == "__main__":
    main()
