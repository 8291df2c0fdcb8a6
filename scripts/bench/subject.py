"""What the benchmarks beside this file have in common: a model of a known shape, masks for it, and two things timed in
turn. No program of its own."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import budget_of
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.loading import devices_of, load_model
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.source import resolve
from pgprune_cli.search.costs import synchronised_clock

SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {"vocab": 1000, "hidden": 64, "channels": 160, "layers": 2, "heads": 4, "groups": 2},
    "smollm2-135m": {
        "vocab": 49152,
        "hidden": 576,
        "channels": 1536,
        "layers": 30,
        "heads": 9,
        "groups": 3,
        "tied": True,
    },
    "llama-7b": {"vocab": 32000, "hidden": 4096, "channels": 11008, "layers": 32, "heads": 32, "groups": 32},
    "llama3-8b": {"vocab": 128256, "hidden": 4096, "channels": 14336, "layers": 32, "heads": 32, "groups": 8},
    "llama-13b": {"vocab": 32000, "hidden": 5120, "channels": 13824, "layers": 40, "heads": 40, "groups": 40},
}
"""By name: random weights of these shapes are as fast as real ones."""


class Ratio(NamedTuple):
    """Median seconds of two things timed in turn; of one over the other, pair by pair: median, least, greatest."""

    one: float
    other: float
    ratio: float
    least: float
    greatest: float


def arguments(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """What all of these programs are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SHAPES)
    parser.add_argument("model", help=f"{names}: random weights of that shape; or anything a recipe's model may be")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"pairs that are timed (default: {repeats})")
    parser.add_argument("--batch", type=int, default=8, help="windows of a forward (default: 8)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window (default: 128)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, float16, bfloat16 (default: bfloat16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    return parser


def open_evaluator(options: argparse.Namespace) -> Evaluator:
    """The model that the options name."""
    if options.model in SHAPES:
        return Evaluator(random_model(options.model, getattr(torch, options.dtype), devices_of(options.device)[0]))
    return Evaluator(load_model(resolve(options.model), options.dtype, options.device))


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama of that shape, its weights made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["channels"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        tie_word_embeddings=shape.get("tied", False),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def some_tokens(evaluator: Evaluator, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(evaluator.model.config.vocab_size, (options.batch, options.seqlen), generator=generator)
    return tokens.to(evaluator.input_device)


def random_mask(evaluator: Evaluator, kept: float, seed: int = 0) -> ModelMask:
    """Random units of every family, so many of each."""
    space = evaluator.shape.space(("attention", "ffn"))
    theta = torch.rand(space.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return evaluator.shape.keep(space, hard_mask(theta, space, budget_of(space, 1.0 - kept, "per-family")))


def in_turn(one: Callable[[], object], other: Callable[[], object], repeats: int, device: torch.device) -> Ratio:
    """Times both, one after the other, so that what else the machine does falls on both. The first pair warms up."""
    pairs = [(seconds(one, device), seconds(other, device)) for _ in range(repeats + 1)][1:]
    ratios = [a / b for a, b in pairs]
    medians = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Ratio(*medians, statistics.median(ratios), min(ratios), max(ratios))


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """Until the device has done it."""
    began = synchronised_clock(device)
    act()
    return (synchronised_clock(device) - began) / 1e9


def headline(options: argparse.Namespace, device: torch.device) -> str:
    """What was measured where."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"{options.model}, {options.dtype}, {options.batch} × {options.seqlen} tokens, {where}"


def opened(options: argparse.Namespace) -> tuple[Evaluator, Tensor]:
    """The model and a batch for it `(B, T)`; says what is measured where."""
    evaluator = open_evaluator(options)
    tokens = some_tokens(evaluator, options)
    print(headline(options, evaluator.input_device))
    return evaluator, tokens


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown, to be pasted; floats to three digits."""
    print(f"| {' | '.join(headings)} |")
    print(f"|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |", flush=True)
