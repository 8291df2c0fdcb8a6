"""A random model whose matrices outweigh everything else, for tests that count bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe

VOCABULARY = 200


def medium_model(dtype: torch.dtype = torch.float32, **sizes: int) -> nn.Module:
    """Return a Llama of 3 layers with 2 KV heads of 4 query heads each and 192 channels; hidden 64, tied embeddings.

    sizes: replaces entries of its config.
    """
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
    """Return the demo's recipe with sparsity 0.5, which suits the medium model, and the loss as its objective."""
    return load(find("demo"), ["budget.sparsity=0.5", "search.objective=loss", *overrides])


def random_batches(windows: int = 4, length: int = 16, batches: int = 2) -> list[Tensor]:
    """Return random batches of tokens `(windows, length)`, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (windows, length), generator=generator) for _ in range(batches)]
