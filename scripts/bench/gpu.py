"""Measure a GPU with models of the shapes of LLaMA-7B and Llama-3-8B: minutes by phase, memory against the estimate.

    python scripts/bench/gpu.py [SHAPE …] [--layers 8] [--device cuda] [--out gpu.md]

This runs `pgprune search`, `export` and `recover` with the recipes for these models (`configs/`) on random weights and
random words, and writes one Markdown table. Nothing is downloaded. Only some of the layers are measured. The columns
`scaled` take each phase to all layers, by the FLOPs that the estimate counts for it: they are no measurement. Memory is
what PyTorch has allocated at most. `--device cpu --layers 2 --hidden 64` tries the script itself.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from subject import SHAPES, llama_config, random_llama

import pgprune_cli
from pgprune_cli.console.progress import StderrProgress
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.estimate.sizes import flops_per_token
from pgprune_cli.jobs.estimate import estimate, estimate_recovery
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.recover import recover
from pgprune_cli.jobs.recovery_request import Request
from pgprune_cli.jobs.search import search
from pgprune_cli.model.devices import devices_of
from pgprune_cli.model.loading import empty_model
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.training_history import read_training_history

RECIPES = {"llama-7b": "llama-7b-50", "llama3-8b": "llama3-8b-50"}
"""The recipe of each shape."""

HIDDEN = 4096
"""The hidden size of both shapes."""

PHASES = ("scores", "width table", "steps", "repair")
"""The phases that are measured."""

TRAINING_STEPS = 6
"""Optimizer steps of the recovery."""

MISSING = "–"


@dataclass
class Measured:
    """One shape.

    layers: measured, and of the whole model; estimates: of the same two; seconds: by phase; scaled: to the whole model;
    speed: tokens per second of the recovery, measured and scaled; recovery_bytes: its estimate; peaks: bytes by job,
    empty if the device does not count them; failure: why the rest is missing.
    """

    layers: tuple[int, int]
    estimates: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    seconds: Mapping[str, float] = field(default_factory=dict)
    scaled: Mapping[str, float] = field(default_factory=dict)
    speed: tuple[float, float] | None = None
    recovery_bytes: int | None = None
    peaks: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


def main() -> None:
    options = arguments()
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()
    results: dict[str, Measured] = {}
    for name in options.shapes:
        results[name] = measure(name, options)
        text = markdown(results, devices_of(options.device)[0], time.monotonic() - began)
        options.out.write_text(text)  # each time: a later shape may be stopped from outside
    print(text)
    raise SystemExit(any(result.failure for result in results.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(RECIPES), metavar="SHAPE", help=", ".join(RECIPES))
    parser.add_argument("--layers", type=int, default=8, help="layers to measure (default: 8)")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="shrink everything else alike (default: 4096)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="CUDA_VISIBLE_DEVICES chooses the GPU (default: cuda)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipes")
    parser.add_argument("--folder", type=Path, help="where the models are written, about 25 GB (default: $TMPDIR)")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the table (default: gpu.md)")
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(RECIPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}. Choose from {', '.join(RECIPES)}")
    return options


def measure(name: str, options: argparse.Namespace) -> Measured:
    """Measure one shape. Whatever fails is recorded, and the other shapes are still measured."""
    whole = int(SHAPES[name]["layers"])
    result = Measured((min(options.layers, whole), whole))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        try:
            _measure(name, options, Path(folder), result)
        except Exception as error:  # of dozens of kinds on a machine where nothing has run yet
            kind = "" if isinstance(error, (RunError, UserError)) else f"{type(error).__name__}: "
            result.failure = kind + " ".join(str(error).split())
    return result


def _measure(name: str, options: argparse.Namespace, folder: Path, result: Measured) -> None:
    device, progress = devices_of(options.device)[0], StderrProgress()
    recipe = recipe_for(name, options, folder)
    with progress.working(f"{name}: writing random weights"):
        for layers, model in zip(result.layers, ("model", "whole"), strict=True):
            config = llama_config(shape_of(name, options.hidden, layers))
            write_model(folder / model, config, device if model == "model" else None)
        write_text(folder / "text.txt", recipe, config.vocab_size)
    whole = load(find(RECIPES[name]), [*overrides(options, folder), f"model={folder / 'whole'}"])
    result.estimates = (estimate(recipe, progress=progress), estimate(whole, progress=progress))
    with peak_of("search", device, result):
        result.seconds = search(recipe, folder / "run", progress=progress).phases
    result.scaled = {phase: result.seconds[phase] * ratio for phase, ratio in ratios(result.estimates).items()}
    export(folder / "run", folder / "pruned", progress=progress)
    request = Request(str(folder / "pruned"), folder / "recovered", folder / "training", recipe)
    result.recovery_bytes = estimate_recovery(request.model, recipe, progress=progress)["memory"]["device"]
    with peak_of("recovery", device, result):
        recover(request, progress=progress)
    rows = read_training_history(request.run)[1:]
    speed = statistics.median([row.tokens_per_second for row in rows if row.tokens_per_second][1:])
    result.speed = (speed, speed / layers_ratio(request.model, recipe.recover.seqlen, result.layers))


# --- the models, the text and the recipe


def shape_of(name: str, hidden: int, layers: int) -> dict[str, int | bool]:
    """Return a shape with other sizes. The number of heads stays."""
    shape = SHAPES[name]
    smaller = {key: int(shape[key]) * hidden // HIDDEN for key in ("vocab", "hidden", "channels")}
    return {**shape, **smaller, "layers": layers}


def write_model(directory: Path, config: Any, device: torch.device | None) -> None:
    """Write a model with a tokenizer of words. device: where the weights are created, None for no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {word(index): index for index in range(3, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(directory)
    config.bos_token_id, config.eos_token_id = 0, 1
    config.dtype = torch.bfloat16
    if device is None:
        config.save_pretrained(directory)
    else:
        random_llama(config, torch.bfloat16, device).save_pretrained(directory)
        release(device)


def word(index: int) -> str:
    return f"w{index}"


def write_text(path: Path, recipe: Recipe, vocabulary: int) -> None:
    """Write as many random words as the search and the recovery read."""
    calibration, scores, settings = recipe.calibration, recipe.scores, recipe.recover
    windows = calibration.windows + calibration.heldout + recipe.repair.windows
    count = windows * calibration.seqlen + scores.windows * scores.seqlen
    count += settings.tokens + settings.heldout * settings.seqlen
    draw = random.Random(0)
    lines = (" ".join(word(draw.randrange(3, vocabulary)) for _ in range(1000)) for _ in range(count // 900 + 10))
    path.write_text("\n".join(lines))


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    return [f"device={options.device}", f"calibration.corpus={folder / 'text.txt'}", *options.set]


def recipe_for(name: str, options: argparse.Namespace, folder: Path) -> Recipe:
    """Return the recipe of a shape for the measured model. Its recovery takes a few steps."""
    own = [*overrides(options, folder), f"model={folder / 'model'}"]
    settings = load(find(RECIPES[name]), own).recover
    tokens = TRAINING_STEPS * settings.batch * settings.accumulate * settings.seqlen
    few = [f"recover.tokens={tokens}", "recover.heldout=8", f"recover.checkpoint_every={TRAINING_STEPS}"]
    return load(find(RECIPES[name]), [*own, *few])


# --- measuring and scaling


@contextmanager
def peak_of(job: str, device: torch.device, result: Measured) -> Iterator[None]:
    """Record the most memory that PyTorch allocates inside the `with`, if the device counts it."""
    release(device)
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        result.peaks[job] = torch.cuda.max_memory_allocated(device)
        release(device)


def release(device: torch.device) -> None:
    """Free what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratios(estimates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return by phase the FLOPs of the whole model over those of the measured one."""
    measured, whole = (
        {phase: sum(estimated["flops"].get(phase, {}).values()) for phase in PHASES} for estimated in estimates
    )
    return {phase: whole[phase] / flops for phase, flops in measured.items() if flops}


def layers_ratio(model: str, context: int, layers: tuple[int, int]) -> float:
    """Return the FLOPs per token of a pruned model with all layers over those of the measured ones, with the head."""
    pruned = empty_model(model, "auto")
    head, body = 2 * pruned.head.weight.numel(), sum(flops_per_token(pruned, context))
    return (head + body * layers[1] / layers[0]) / (head + body)


# --- the table


def markdown(results: Mapping[str, Measured], device: torch.device, seconds: float) -> str:
    """Return the table, with two columns for each shape, and what else there is to know."""
    headings, parts = [""], []
    for name, result in results.items():
        layers, whole = result.layers
        headings += [f"{name}, {layers} layers", f"{name}, all {whole} layers (scaled)"]
        parts += [measured_cells(result), scaled_cells(result)]
    rows = [headings, ["---"] * len(headings), *([row, *(cells[row] for cells in parts)] for row in parts[0])]
    notes = [
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        f"{machine(device)}. All of it took {seconds / 60:.1f} minutes. Scaled: times the ratio of FLOPs, by phase.",
        *(f"{name} failed: {result.failure}" for name, result in results.items() if result.failure),
    ]
    return "\n\n".join(notes) + "\n"


def measured_cells(result: Measured) -> dict[str, str]:
    """Return the cells of what was measured, by row."""
    speed = result.speed and result.speed[0]
    return cells(result.seconds, result.estimates[0], speed) | {
        "GB, search": gigabytes(result.peaks.get("search")),
        "GB, search, estimate": gigabytes(needed_by(result.estimates[0])),
        "GB, recovery": gigabytes(result.peaks.get("recovery")),
        "GB, recovery, estimate": gigabytes(result.recovery_bytes),
    }


def scaled_cells(result: Measured) -> dict[str, str]:
    """Return the cells of the whole model, by row. Nobody knows its peaks."""
    speed = result.speed and result.speed[1]
    return cells(result.scaled, result.estimates[1], speed) | {
        "GB, search": MISSING,
        "GB, search, estimate": gigabytes(needed_by(result.estimates[1])),
        "GB, recovery": MISSING,
        "GB, recovery, estimate": MISSING,
    }


def cells(seconds: Mapping[str, float], estimated: Mapping[str, Any], speed: float | None) -> dict[str, str]:
    """Return the cells of times and speeds, by row."""
    phases = {phase: seconds[phase] for phase in PHASES if phase in seconds}
    return {
        **{f"{phase}, minutes": minutes(phases.get(phase)) for phase in PHASES},
        "these phases, minutes": minutes(sum(phases.values()) if phases else None),
        "these phases, minutes, estimate": minutes(estimated_seconds(estimated)),
        "recovery, tokens/s": MISSING if speed is None else f"{speed:,.0f}",
    }


def estimated_seconds(estimated: Mapping[str, Any]) -> float | None:
    """Return the seconds that the estimate has for the measured phases."""
    return sum(estimated["phases"][phase]["seconds"] for phase in PHASES) if estimated else None


def needed_by(estimated: Mapping[str, Any]) -> int | None:
    """Return the bytes that a search takes on its device at most: what it needs, and what it keeps there if it can."""
    if not estimated:
        return None
    memory = estimated["memory"]
    return memory["device"] + memory["width_table"] + memory["hidden_states"] * memory["hidden_states_on_device"]


def minutes(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds / 60:.3g}"


def gigabytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 1e9:.3g}"


def machine(device: torch.device) -> str:
    """Describe the device, its driver and the versions in one line."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, pgprune {pgprune_cli.__version__}"
    if device.type != "cuda":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}"
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 1e9:.0f} GB"
    return f"{properties.name}, {memory}, driver {driver()}, CUDA {torch.version.cuda}, {versions}"


def driver() -> str:
    """Return the version of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or "unknown"


if __name__ == "__main__":
    main()
