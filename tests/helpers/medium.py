"""A random model of which the matrices outweigh all else, so that what is large can be counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe

VOCABULARY = 200


def medium_model(dtype: torch.dtype = torch.float32, **sizes: int) -> nn.Module:
    """A Llama: 3 layers of 2 KV heads with 4 query heads each and 192 channels; hidden 64, embeddings tied."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
        | sizes
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def medium_recipe(*overrides: str) -> Recipe:
    """The demo's, for the medium model: half of all units go."""
    return load(find("demo"), ["budget.sparsity=0.5", *overrides])


def some_batches(windows: int = 4, length: int = 16, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (windows, length), generator=generator) for _ in range(batches)]
