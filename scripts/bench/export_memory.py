"""Measure the memory of an export, for checkpoints of LLaMA-7B's sizes and of half its layers.

    python scripts/bench/export_memory.py [--layers 16 32] [--hidden 4096] [--dtype bfloat16] [--folder DIR]

The weights are random, in shards of 1 GB. Half of the units are removed and the output projections are repaired (with
random weights, from a file like one that a search writes). Every export runs in a process of its own and reports its
peak resident memory (VmHWM, so on Linux only), which includes the mapped pages of the open shard. If the peak does not
grow with the layers, it does not depend on the model's size. Needs disk space for a checkpoint, its repair and export.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pgprune_cli.export.plan import Options
from pgprune_cli.jobs.export import export
from pgprune_cli.model.masks import LayerMask, RepairedBlock
from pgprune_cli.model.source import INDEX, resolve
from pgprune_cli.run.decision import Decision

SHARD = 10**9


class Model(NamedTuple):
    """A checkpoint on disk, and the run directory of a decision about it."""

    checkpoint: Path
    run: Path
    bytes: int


def config_of(layers: int, hidden: int) -> LlamaConfig:
    """LLaMA-7B's proportions; heads of 128."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        head_dim=128,
    )


def make(folder: Path, layers: int, hidden: int, dtype: torch.dtype) -> Model:
    """Write a random checkpoint shard by shard, a decision that keeps half of every layer, and its repair."""
    config = config_of(layers, hidden)
    tensors = tensors_of(config, dtype)
    draw = random_tensors(dtype)
    checkpoint, run = folder / "base", folder / "run"
    checkpoint.mkdir(parents=True)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(checkpoint)
    shard_of, shard_names = {}, list(shards(tensors))
    for number, names in enumerate(shard_names, 1):
        file = f"model-{number:05}-of-{len(shard_names):05}.safetensors"
        save_file({name: draw(tensors[name].shape).clone() for name in names}, checkpoint / file)
        shard_of |= dict.fromkeys(names, file)
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    heads, channels = torch.arange(config.num_attention_heads), torch.arange(config.intermediate_size)
    # The last layer keeps a few more channels, so that the layers differ.
    model_mask = tuple(
        LayerMask(heads % 2 == 0, (channels % 2 == 0) | (channels < 8 * (index == layers - 1)))
        for index in range(layers)
    )
    repaired = {}
    for index, layer in enumerate(model_mask):
        for name, width in (("attention", int(layer.attention.sum()) * 128), ("ffn", int(layer.ffn.sum()))):
            repaired[index, name] = RepairedBlock(draw((hidden, width)).clone(), None)
    fingerprint = resolve(str(checkpoint)).fingerprint()
    recipe = f"dtype: {str(dtype).removeprefix('torch.')}"
    Decision(model_mask, str(checkpoint), fingerprint, 0.5, recipe, 0, 0, 0, None, repaired).save(run)
    return Model(checkpoint, run, sum(tensor.nbytes for tensor in tensors.values()))


def tensors_of(config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors by name, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()


def random_tensors(dtype: torch.dtype) -> Callable[[Sequence[int]], torch.Tensor]:
    """Return a function that gives random weights by shape. Equal shapes share weights: drawing billions takes long."""
    return cache(lambda shape: torch.randn(shape, dtype=dtype) * 0.02)


def shards(tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield the names in groups of at most 1 GB."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def measured(run: Path, out: Path) -> None:
    """Export, and print the memory that the kernel reports. Runs in a process of its own."""
    before = peak_memory()
    began = time.perf_counter()
    planned = export(run, out, Options(shard_size=SHARD))
    seconds = time.perf_counter() - began
    print(json.dumps({"before": before, "peak": peak_memory(), "seconds": seconds, "bytes": planned.bytes}))


def peak_memory() -> int:
    """Return the peak resident bytes of this process. (getrusage would include the parent process.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--folder", type=Path, help="parent folder for the checkpoints (default: the system's temporary folder)"
    )
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(*options.measure)
        return
    dtype = getattr(torch, options.dtype)
    print(f"{'layers':>6} {'base GB':>8} {'export GB':>9} {'start MB':>8} {'peak MB':>8} {'s':>6}")
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            needed = 2 * sum(tensor.nbytes for tensor in tensors_of(config_of(layers, options.hidden), dtype).values())
            if (free := shutil.disk_usage(folder).free) < needed:
                sys.exit(
                    f"{layers} layers need about {needed / 1e9:.0f} GB of disk, but only {free / 1e9:.0f} GB are free."
                )
            model = make(folder, layers, options.hidden, dtype)
            command = [sys.executable, __file__, "--measure", str(model.run), str(folder / "out")]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(
                f"{layers:>6} {model.bytes / 1e9:>8.2f} {result['bytes'] / 1e9:>9.2f} {result['before'] / 1e6:>8.0f} "
                f"{result['peak'] / 1e6:>8.0f} {result['seconds']:>6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
