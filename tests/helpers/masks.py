"""Decisions on the tiny models, tokens to evaluate them on, and repaired outputs to evaluate them with."""

import torch
from torch import Tensor, nn

from helpers.models import VOCABULARY
from pgprune_cli.model.masks import LayerMask, ModelMask, Output, Outputs

GROUPS, CHANNELS, LAYERS = 4, 24, 4


def some_tokens(seed: int = 0, rows: int = 3, length: int = 24) -> Tensor:
    """Longer than the sliding window of the tiny Mistral."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_mask(seed: int, empty_attention: tuple[int, ...] = (), empty_ffn: tuple[int, ...] = ()) -> ModelMask:
    """About half of all units, at least one a block but for the layers named."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(LAYERS):
        attention = torch.rand(GROUPS, generator=generator) < 0.5
        ffn = torch.rand(CHANNELS, generator=generator) < 0.5
        attention[index % GROUPS] = ffn[index] = True
        layers.append(LayerMask(attention & (index not in empty_attention), ffn & (index not in empty_ffn)))
    return tuple(layers)


def dense() -> ModelMask:
    return tuple(LayerMask(torch.ones(GROUPS).bool(), torch.ones(CHANNELS).bool()) for _ in range(LAYERS))


def only(index: int, attention: list[int], ffn: list[int]) -> ModelMask:
    """Dense but for one layer, of which the units listed stay."""
    layers = list(dense())
    layers[index] = LayerMask(
        torch.tensor([unit in attention for unit in range(GROUPS)]),
        torch.tensor([unit in ffn for unit in range(CHANNELS)]),
    )
    return tuple(layers)


EVERY = list(range(CHANNELS))


MODEL_MASKS = {
    "dense": dense(),
    "random": random_mask(0),
    "another random": random_mask(1),
    "empty attention": random_mask(2, empty_attention=(2,)),
    "empty ffn": random_mask(3, empty_ffn=(1,)),
    "an empty layer": random_mask(4, empty_attention=(2,), empty_ffn=(2,)),
    "layer 0 empty": random_mask(5, empty_attention=(0,), empty_ffn=(0,)),
    "the last layer empty": random_mask(6, empty_attention=(3,), empty_ffn=(3,)),
    "all empty": random_mask(7, empty_attention=(0, 1, 2, 3), empty_ffn=(0, 1, 2, 3)),
    "one channel left": only(1, [0, 1, 2, 3], [5]),
    "one group left": only(0, [3], EVERY),
}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def some_outputs(model: nn.Module, keep: ModelMask, bias: bool) -> Outputs:
    """A random output projection for every block that keeps some units, also for those that keep all."""
    generator, outputs = torch.Generator().manual_seed(0), {}
    for index, (layer, kept) in enumerate(zip(model.model.layers, keep, strict=True)):
        for name, linear in (("attention", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):
            mask = kept.of(name)
            if mask.any():
                inputs = int(mask.sum()) * linear.in_features // len(mask)
                weight = 0.3 * torch.randn(linear.out_features, inputs, generator=generator)
                outputs[index, name] = Output(weight, torch.randn(32, generator=generator) if bias else linear.bias)
    return outputs
