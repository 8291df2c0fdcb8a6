"""What does a step of the search take besides its forward passes? And how many forward passes a second come out in the end?

    python scripts/bench/search_step.py MODEL [--policy layers] [--samples 16] [--keep 0.5] [--repeats 5]

`pgprune search` itself runs, on the model named here and the demo's text, with made-up repairs in place of solved ones
(they take the memory and time of real ones in a step). Whatever is not a forward pass counts as outside: sampling,
projection, masks, hooks, history, progress, checkpoints. A dense forward of the same tokens is timed after every step.
Each forward is waited for here, so that on a GPU, where the host works ahead, the share outside is an upper bound.
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
from subject import arguments, headline, open_evaluator, seconds, some_tokens, table
from torch import Tensor, nn

from pgprune_cli.forward import masked as masked
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.jobs import search
from pgprune_cli.model.masks import Output
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.least_squares import Repaired
from pgprune_cli.repair.width_table import WidthTable, width_step
from pgprune_cli.run.history import Row
from pgprune_cli.search import loop, problem
from pgprune_cli.search.progress import SearchProgress


class Watch:
    """Seconds of every step, of the forward passes in it and of a dense forward behind it; and their number."""

    def __init__(self, evaluator: Evaluator, tokens: Tensor) -> None:
        self.evaluator, self.tokens = evaluator, tokens
        self.steps: list[tuple[float, float, float, int]] = []
        self.begin()

    def begin(self) -> None:
        self.began, self.inside, self.forward_passes = time.perf_counter(), 0.0, 0

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        losses: list[Tensor] = []
        self.inside += seconds(lambda: losses.append(summed_loss(model, tokens)), self.evaluator.input_device)
        self.forward_passes += 1
        return losses[0]

    def end(self) -> None:
        taken = time.perf_counter() - self.began
        dense = seconds(lambda: summed_loss(self.evaluator.model, self.tokens), self.evaluator.input_device)
        self.steps.append((taken, self.inside, dense, self.forward_passes))
        self.begin()


def made_up_table(
    recipe: Recipe, run: Path, model: nn.Module, scores: Mapping[tuple[int, str], Tensor], *_: Any
) -> WidthTable:
    """Errors that rise evenly, and the dense projections' own columns as repairs, at the widths of a real table."""
    shape = PrunableModel.of(model).shape
    errors, orders, outputs = {}, {}, {}
    for (index, name), values in scores.items():
        weight = model.get_submodule(shape.spec.layers)[index].get_submodule(
            dict(shape.spec.blocks())[name].output_path
        )
        units = len(values)
        orders[index, name] = values.argsort(descending=True)
        errors[index, name] = torch.linspace(1.0, 0.0, units + 1, dtype=torch.float64).square()
        widths = range(width_step(units), units, width_step(units))
        columns = {kept: weight.weight[:, : kept * weight.in_features // units] for kept in widths}
        outputs[index, name] = {kept: Output(some.clone().cpu(), None) for kept, some in columns.items()}
    return WidthTable(errors, orders, outputs)


def watched_steps(evaluator: Evaluator, overrides: list[str], tokens: Tensor) -> list[tuple[float, float, float, int]]:
    """Runs the search. Returns of every step but the first (seconds, in forward passes, of a dense forward, forward passes)."""
    watch = Watch(evaluator, tokens)

    class Shown(SearchProgress):
        def show(self, row: Row) -> None:
            super().show(row)
            watch.end()

    with ExitStack() as patched, tempfile.TemporaryDirectory() as folder:
        patched.enter_context(patch.object(search, "load_model", lambda *_: evaluator.model))
        patched.enter_context(patch.object(problem, "searched_table", made_up_table))
        patched.enter_context(patch.object(search, "repair", lambda _, keep, *__: Repaired(keep, {})))
        patched.enter_context(patch.object(loop, "SearchProgress", Shown))
        patched.enter_context(patch.object(masked, "summed_loss", watch.loss))
        search.search(load(find("demo"), overrides), Path(folder) / "run")
    return watch.steps[1:]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--policy", choices=("widths", "units"), default="widths")
    parser.add_argument("--samples", type=int, default=16)
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
        "scores.metric=magnitude",
    ]
    steps = watched_steps(evaluator, overrides, some_tokens(evaluator, options))
    print(headline(options, evaluator.input_device))
    taken, inside, _, forward_passes = (sum(column) for column in zip(*steps, strict=True))
    outside = [1.0 - inner / whole for whole, inner, _, _ in steps]
    end_to_end = [whole / count / dense for whole, _, dense, count in steps]
    table(
        (
            "policy",
            "keep",
            "step s",
            "outside, ratio",
            "least",
            "greatest",
            "forward_passes/s",
            "a forward over a dense one",
        ),
        [
            (
                options.policy,
                options.keep,
                statistics.median(whole for whole, *_ in steps),
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
