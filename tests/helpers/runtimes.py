"""Tiny random models in every odd shape that a decision can leave, as exported directories with their greedy tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from helpers.models import VOCABULARY, tiny_config
from pgprune_cli.serving.modeling_pruned import FAMILIES

# KV heads and channels of every layer. The dense ones have 4 and 24.
SIZES = {
    "every layer has heads": [(4, 24), (3, 8), (1, 24), (2, 16)],
    "no heads, no channels": [(2, 0), (0, 9), (4, 24), (0, 5)],
    "no heads in the first layer": [(0, 9), (3, 24), (1, 0), (2, 7)],
}


def write_pruned(architecture: str, sizes: list[tuple[int, int]], out: Path, output_biases: tuple[str, ...] = ()):
    """A random float32 model of these sizes, written by transformers into `out` and returned, in eval mode."""
    dense = tiny_config(architecture)
    ratio = dense.num_attention_heads // dense.num_key_value_heads
    overrides = {
        str(index): ({"num_attention_heads": groups * ratio, "num_key_value_heads": groups} if groups else {})
        | ({"intermediate_size": channels} if channels else {})
        | ({"skip": [name for name, size in (("attention", groups), ("mlp", channels)) if not size]})
        for index, (groups, channels) in enumerate(sizes)
    }
    causal = FAMILIES[dense.model_type]
    given = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
    given["head_dim"] = 32  # the least of vLLM's attention on a CPU
    given |= {"per_layer_config": overrides} | ({"output_biases": list(output_biases)} if output_biases else {})
    torch.manual_seed(0)
    model = causal(causal.config_class(**given))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, mean=1.0 if parameter.mean() > 0.5 else 0.0, std=0.2)
    model.eval().requires_grad_(False).save_pretrained(out)
    return model


def prompts() -> list[list[int]]:
    """Token ids; one prompt is longer than the tiny Mistral's window of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 9, 21)]


@torch.inference_mode()
def greedy(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The `count` tokens that transformers puts after the prompt, and their log probabilities; no end of text."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = made.windows[0, len(prompt) :]
    logprobs = torch.stack(made.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.tolist()
