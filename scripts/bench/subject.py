"""What the benchmarks share: models of known shapes, random masks, and the timing of two functions in turn."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.core.projection import coarser, hard_mask
from pgprune_cli.core.space import budget_of
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.loading import devices_of, load_prunable
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.repair.width_table import width_step
from pgprune_cli.scores.metrics import partitions
from pgprune_cli.search.costs import synchronised_clock

SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {"vocab": 1000, "hidden": 64, "channels": 160, "layers": 2, "heads": 4, "kv_heads": 2},
    "smollm2-135m": {
        "vocab": 49152,
        "hidden": 576,
        "channels": 1536,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "tied": True,
    },
    "llama-7b": {"vocab": 32000, "hidden": 4096, "channels": 11008, "layers": 32, "heads": 32, "kv_heads": 32},
    "llama3-8b": {"vocab": 128256, "hidden": 4096, "channels": 14336, "layers": 32, "heads": 32, "kv_heads": 8},
    "llama-13b": {"vocab": 32000, "hidden": 5120, "channels": 13824, "layers": 40, "heads": 40, "kv_heads": 40},
    "llama3-70b": {"vocab": 128256, "hidden": 8192, "channels": 28672, "layers": 80, "heads": 64, "kv_heads": 8},
    "llama3-405b": {"vocab": 128256, "hidden": 16384, "channels": 53248, "layers": 126, "heads": 128, "kv_heads": 8},
}
"""Shapes by name. Random weights of these shapes are as fast as real ones."""


class Ratio(NamedTuple):
    """Two functions timed in turn: the median seconds of each; the median, least and greatest ratio over the pairs."""

    first: float
    second: float
    ratio: float
    least: float
    greatest: float


def arguments(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SHAPES)
    parser.add_argument("model", help=f"{names}: random weights of that shape; or anything a recipe's model may be")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed pairs (default: {repeats})")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward pass (default: 8)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens per window (default: 128)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, float16, bfloat16 (default: bfloat16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    return parser


def open_evaluator(options: argparse.Namespace) -> Evaluator:
    """Load the model that the options name."""
    if options.model in SHAPES:
        model = random_model(options.model, getattr(torch, options.dtype), devices_of(options.device)[0])
        return Evaluator(PrunableModel.of(model))
    return Evaluator(load_prunable(resolve(options.model), options.dtype, options.device))


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a Llama of that shape with random weights, created on the device."""
    return random_llama(llama_config(SHAPES[name]), dtype, device)


def llama_config(shape: Mapping[str, int | bool]) -> Any:
    """Return the transformers config of a Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["channels"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        tie_word_embeddings=shape.get("tied", False),
    )


def random_llama(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a model with random weights, created on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_tokens(evaluator: Evaluator, options: argparse.Namespace) -> Tensor:
    """Return a batch of random tokens `(B, T)` on the model's device."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(evaluator.model.config.vocab_size, (options.batch, options.seqlen), generator=generator)
    return tokens.to(evaluator.model.device)


def random_mask(evaluator: Evaluator, kept: float, seed: int = 0) -> ModelMask:
    """Return a mask that keeps the fraction `kept` of every family's units, drawn at random.

    Like the masks of a width search, it has widths of the table.
    """
    shape, families = evaluator.model.shape, ("attention", "ffn")
    units = partitions(shape, families, True, shape.parameters, {}, "random")
    space = shape.space(families, units)
    theta = torch.rand(space.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = torch.tensor([width_step(count) for count in space.pair_counts.tolist()])
    mask = hard_mask(theta, space, coarser(budget_of(space, 1.0 - kept, "per-family"), space, steps))
    return shape.model_mask(space, mask, units)


def in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int, device: torch.device) -> Ratio:
    """Time both in turn, so that other load on the machine slows both alike. The first pair only warms up."""
    pairs = [(seconds(first, device), seconds(second, device)) for _ in range(repeats + 1)][1:]
    ratios = [a / b for a, b in pairs]
    medians = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Ratio(*medians, statistics.median(ratios), min(ratios), max(ratios))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device has finished `run`."""
    began = synchronised_clock(device)
    run()
    return (synchronised_clock(device) - began) / 1e9


def headline(options: argparse.Namespace, device: torch.device) -> str:
    """Describe the model, the batch and the device in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"{options.model}, {options.dtype}, {options.batch} × {options.seqlen} tokens, {name}"


def opened(options: argparse.Namespace) -> tuple[Evaluator, Tensor]:
    """Load the model, make a batch for it `(B, T)`, and print the headline."""
    evaluator = open_evaluator(options)
    tokens = random_tokens(evaluator, options)
    print(headline(options, evaluator.model.device))
    return evaluator, tokens


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, with floats to three significant digits."""
    print(f"| {' | '.join(headings)} |")
    print(f"|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |", flush=True)
