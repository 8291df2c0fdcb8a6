"""Check that a search takes no more memory than it must: load a model in a process of its own and evaluate masks.

    python scripts/bench/search_memory.py MODEL [--keep 0.5] [--repeats 3] [--weight-format int8]

The limit is 1.10 times the weights, plus the activations of a forward pass and the slices of one block
(pgprune_cli/estimate/memory.py), on top of a process that has loaded its libraries and run a tiny model. The ratio is
the peak over that limit: of resident memory (VmHWM, so on Linux only) or, on a GPU, of what PyTorch allocates. Exits
with 1 if the ratio is above 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import torch
from subject import SHAPES, arguments, headline, open_evaluator, random_mask, random_model, random_tokens, table
from torch import Tensor

from pgprune_cli.estimate.memory import Memory, memory
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.loading import WeightFormat, devices_of, load_prunable
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import BudgetSettings, CalibrationSettings, Recipe

SLACK = 1.10


def needed(evaluator: Evaluator, tokens: Tensor, weight_format: WeightFormat) -> Memory:
    """Return the memory that the estimate allows for a search."""
    recipe = Recipe(
        model="",
        weight_format=weight_format,
        calibration=CalibrationSettings(corpus=""),
        budget=BudgetSettings(sparsity=0.5),
    )
    return memory(Sizes(evaluator.model, recipe), Texts([], [], [], tokens, tokens))


def measured(folder: str, options: argparse.Namespace) -> dict[str, int]:
    """Return the bytes in use before the model is loaded, after it, and at the peak. Runs in a process of its own."""
    device = devices_of(options.device)[0]
    tiny = Evaluator(PrunableModel.of(random_model("tiny", getattr(torch, options.dtype), device)))
    tiny.losses([random_mask(tiny, options.keep)], random_tokens(tiny, options) % SHAPES["tiny"]["vocab"])
    before = peak_memory(device)
    evaluator = Evaluator(load_prunable(resolve(folder), options.dtype, options.device, options.weight_format))
    loaded = peak_memory(device)
    tokens = random_tokens(evaluator, options)
    for seed in range(options.repeats):
        evaluator.losses([random_mask(evaluator, options.keep, seed)], tokens)
    allowed = needed(evaluator, tokens, options.weight_format)
    return {
        "before": before,
        "loaded": loaded,
        "peak": peak_memory(device),
        "weights": allowed.weights,
        "activations": allowed.activations,
        "slices": allowed.slices,
    }


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of the device or of this process. (getrusage would include the parent process.)"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--weight-format", default="full", choices=get_args(WeightFormat), help="as in a recipe")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.model, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if options.model in SHAPES:  # write them to disk, because a search loads from files
            model = folder
            open_evaluator(argparse.Namespace(**vars(options) | {"device": "cpu"})).model.module.save_pretrained(folder)
        command = [sys.executable, __file__, model, "--measure"]
        for key in ("keep", "repeats", "batch", "seqlen", "dtype", "device", "weight_format"):
            command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    allowed = SLACK * result["weights"] + result["activations"] + result["slices"]
    ratio = (result["peak"] - result["before"]) / allowed
    print(headline(options, devices_of(options.device)[0]) + f", weight format: {options.weight_format}")
    columns = ("before", "loaded", "peak", "weights", "activations", "slices")
    table((*(f"{name} MB" for name in columns), "ratio"), [(*(round(result[name] / 1e6) for name in columns), ratio)])
    sys.exit(int(ratio > 1.0))


if __name__ == "__main__":
    main()
