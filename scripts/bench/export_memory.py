"""How much memory does an export take? Random LLaMA-shaped checkpoints, one half the depth of the other, exported apart.

    python scripts/bench/export_memory.py [--layers 16 32] [--hidden 4096] [--dtype bfloat16] [--keep-files DIR]

A checkpoint has LLaMA-7B's sizes but for its number of layers, in shards of 1 GB; half of the units go, and what is left
of o and down is repaired (with random weights, from a file as a search writes it). Every export runs in a process of its
own, whose peak resident memory (which counts the mapped pages of the open shard) the kernel reports at its end. Peaks
that do not grow with the layers show that it is independent of the model's size. Needs disk for the largest checkpoint,
its repair and its export at a time; it says how much before it begins.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pgprune_cli.arch import LayerKeep, Output
from pgprune_cli.decision import Decision
from pgprune_cli.jobs.export import export
from pgprune_cli.loading import INDEX, resolve
from pgprune_cli.writers import hf

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
    """Writes a random checkpoint shard by shard, a decision that keeps half of every layer, and its repair."""
    config = config_of(layers, hidden)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    checkpoint, run = folder / "base", folder / "run"
    checkpoint.mkdir(parents=True)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(checkpoint)
    places, runs = {}, list(shards(tensors))
    for number, names in enumerate(runs, 1):
        file = f"model-{number:05}-of-{len(runs):05}.safetensors"
        save_file({name: torch.randn(tensors[name].shape, dtype=dtype) * 0.02 for name in names}, checkpoint / file)
        places |= dict.fromkeys(names, file)
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    keep = tuple(
        LayerKeep(
            torch.arange(config.num_attention_heads) % 2 == index % 2, torch.arange(config.intermediate_size) % 2 == 0
        )
        for index in range(layers)
    )
    keep = (*keep[:-1], LayerKeep(keep[-1].attention, torch.arange(config.intermediate_size) < 512))
    outputs = {}
    for index, layer in enumerate(keep):
        for name, width in (("attention", int(layer.attention.sum()) * 128), ("ffn", int(layer.ffn.sum()))):
            outputs[index, name] = Output(torch.randn(hidden, width, dtype=dtype) * 0.02, None)
    fingerprint = resolve(str(checkpoint)).fingerprint()
    recipe = f"dtype: {str(dtype).removeprefix('torch.')}"
    Decision(keep, str(checkpoint), fingerprint, 0.5, recipe, 0, 0, 0, None, outputs).save(run)
    return Model(checkpoint, run, sum(tensor.nbytes for tensor in tensors.values()))


def shards(tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names in runs of at most 1 GB."""
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
    """In a process of its own: exports, and prints what the kernel says of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    planned = export(run, out, hf.Options(shard_size=SHARD))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - began
    print(json.dumps({"before": before, "peak": peak, "seconds": seconds, "bytes": planned.bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; by default a temporary folder")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(*options.measure)
        return
    print(f"{'layers':>6} {'base GB':>8} {'export GB':>9} {'start MB':>8} {'peak MB':>8} {'s':>6}")
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            needed = 2.2 * sum(
                tensor.nbytes for tensor in _meta(layers, options.hidden, getattr(torch, options.dtype)).values()
            )
            if (free := shutil.disk_usage(folder).free) < needed:
                sys.exit(f"{layers} layers need about {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
            model = make(folder, layers, options.hidden, getattr(torch, options.dtype))
            command = [sys.executable, __file__, "--measure", str(model.run), str(folder / "out")]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(
                f"{layers:>6} {model.bytes / 1e9:>8.2f} {result['bytes'] / 1e9:>9.2f} {result['before'] / 1e6:>8.0f} "
                f"{result['peak'] / 1e6:>8.0f} {result['seconds']:>6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
