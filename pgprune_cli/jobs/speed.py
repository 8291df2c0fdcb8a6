"""Generation speed of models: tokens per second, prefill and decode, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.jobs.targets import Target
from pgprune_cli.model.context import longest_context
from pgprune_cli.model.devices import memory_in_use

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 512, 64, 5


def measure_speed(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Measure tokens per second of models in turn, greedy with batch size 1. Return medians of REPEATS for each.

    Prefill is a prompt of PROMPT_TOKENS and one new token, decode is NEW_TOKENS more with the cache. Also returns the
    bytes of the weights, and on CUDA the peak of allocated memory.

    Raises:
        ValueError: a target is a run directory. Speed is that of an export, which may be padded for its runtime.
    """
    if any(target.is_run for target in targets):
        raise ValueError("speed is measured on an exported model, not on a run directory")
    prefill: list[list[float]] = [[] for _ in targets]
    decode: list[list[float]] = [[] for _ in targets]
    peaks = [0] * len(targets)
    for repeat in range(REPEATS + 1):
        for index, target in enumerate(targets):
            prefill_seconds, decode_seconds, peaks[index] = _time_once(target.module)
            if repeat:  # the first is a warm-up
                prefill[index].append(prefill_seconds)
                decode[index].append(decode_seconds)
    return [
        {
            "prefill_tokens_per_second": _prompt(target.module).shape[1] / statistics.median(prefill[index]),
            "decode_tokens_per_second": NEW_TOKENS / statistics.median(decode[index]),
            "weight_bytes": sum(weight.numel() * weight.element_size() for weight in target.module.parameters()),
            "peak_memory_bytes": peaks[index] or None,
        }
        for index, target in enumerate(targets)
    ]


def _prompt(model: Any) -> Tensor:
    """Return random tokens `(1, T)`, at most half of the model's longest context."""
    context = longest_context(model.config) or 2 * PROMPT_TOKENS
    length = min(PROMPT_TOKENS, context // 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    device: torch.device = model.get_input_embeddings().weight.device
    return tokens.to(device)


def _time_once(model: Any) -> tuple[float, float, int]:
    """Return the seconds of one prefill and of one decode, and the peak of CUDA memory in bytes (0 elsewhere)."""
    prompt = _prompt(model)
    cuda = prompt.device.type == "cuda"
    if cuda:  # the layers may be spread over several GPUs
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    prefill = _seconds_to_generate(model, prompt, 1)
    total = _seconds_to_generate(model, prompt, 1 + NEW_TOKENS)
    return prefill, total - prefill, memory_in_use() if cuda else 0


def _seconds_to_generate(model: Any, prompt: Tensor, tokens: int) -> float:
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        min_new_tokens=tokens,  # an end-of-text token must not end it early
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,  # unused, but transformers warns without it
    )
    # In place of the model's own, whose settings (a longest length, a temperature) transformers would mix in.
    own, model.generation_config = model.generation_config, greedy
    try:
        start = time.perf_counter()
        result = model.generate(prompt, attention_mask=torch.ones_like(prompt))
        result[0, -1].item()  # waits for the device
        return time.perf_counter() - start
    finally:
        model.generation_config = own
