"""Tiny random models of every odd shape that a decision can leave, written to disk, with their greedy tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from helpers.models import VOCABULARY, tiny_config
from pgprune_cli.serving.modeling_pruned import FAMILIES

SIZES = {
    "every layer has heads": [(4, 24), (3, 8), (1, 24), (2, 16)],
    "no heads, no channels": [(2, 0), (0, 9), (4, 24), (0, 5)],
    "no heads in the first layer": [(0, 9), (3, 24), (1, 0), (2, 7)],
}
"""KV heads and FFN channels of every layer. The dense models have 4 and 24."""


def write_pruned(
    architecture: str, sizes: list[tuple[int, int]], out: Path, output_biases: tuple[str, ...] = ()
) -> nn.Module:
    """Write a random float32 model of these sizes into `out` with transformers, and return it in eval mode."""
    dense = tiny_config(architecture)
    ratio = dense.num_attention_heads // dense.num_key_value_heads
    per_layer = {
        str(index): ({"num_attention_heads": kv_heads * ratio, "num_key_value_heads": kv_heads} if kv_heads else {})
        | ({"intermediate_size": channels} if channels else {})
        | ({"skip": [name for name, size in (("attention", kv_heads), ("mlp", channels)) if not size]})
        for index, (kv_heads, channels) in enumerate(sizes)
    }
    causal = FAMILIES[dense.model_type]
    config = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
    config["head_dim"] = 32  # the smallest that vLLM's attention accepts on a CPU
    config |= {"per_layer_config": per_layer} | ({"output_biases": list(output_biases)} if output_biases else {})
    torch.manual_seed(0)
    model = causal(causal.config_class(**config))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, mean=1.0 if parameter.mean() > 0.5 else 0.0, std=0.2)
    model.eval().requires_grad_(False).save_pretrained(out)
    return model


def prompts() -> list[list[int]]:
    """Return prompts as token ids. One is longer than the sliding window of the tiny Mistral, which is 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 9, 21)]


@torch.inference_mode()
def greedy(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Return the `count` tokens that transformers appends to the prompt, and their log-probabilities.

    The end-of-text token does not stop it.
    """
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = generated.sequences[0, len(prompt) :]
    logprobs = torch.stack(generated.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.tolist()
