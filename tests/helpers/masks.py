"""Masks of the tiny models, tokens to evaluate them on, and repaired outputs to evaluate them with."""

import torch
from torch import Tensor, nn

from helpers.models import VOCABULARY
from pgprune_cli.model.masks import LayerMask, ModelMask, Output, Outputs

KV_HEADS, CHANNELS, LAYERS = 4, 24, 4


def random_tokens(seed: int = 0, rows: int = 3, length: int = 24) -> Tensor:
    """Return token windows `(rows, length)`, by default longer than the sliding window of the tiny Mistral."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_mask(seed: int, empty_attention: tuple[int, ...] = (), empty_ffn: tuple[int, ...] = ()) -> ModelMask:
    """Return a mask that keeps about half of the units, and at least one per block except in the given layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(LAYERS):
        attention = torch.rand(KV_HEADS, generator=generator) < 0.5
        ffn = torch.rand(CHANNELS, generator=generator) < 0.5
        attention[index % KV_HEADS] = ffn[index] = True
        layers.append(LayerMask(attention & (index not in empty_attention), ffn & (index not in empty_ffn)))
    return tuple(layers)


def dense_mask() -> ModelMask:
    """Return the mask that keeps everything."""
    return tuple(LayerMask(torch.ones(KV_HEADS).bool(), torch.ones(CHANNELS).bool()) for _ in range(LAYERS))


def dense_except(index: int, attention: list[int], ffn: list[int]) -> ModelMask:
    """Return a mask that keeps everything except in one layer, where only the listed units are kept."""
    layers = list(dense_mask())
    layers[index] = LayerMask(
        torch.tensor([unit in attention for unit in range(KV_HEADS)]),
        torch.tensor([unit in ffn for unit in range(CHANNELS)]),
    )
    return tuple(layers)


MODEL_MASKS = {
    "dense": dense_mask(),
    "random": random_mask(0),
    "another random": random_mask(1),
    "empty attention": random_mask(2, empty_attention=(2,)),
    "empty ffn": random_mask(3, empty_ffn=(1,)),
    "an empty layer": random_mask(4, empty_attention=(2,), empty_ffn=(2,)),
    "layer 0 empty": random_mask(5, empty_attention=(0,), empty_ffn=(0,)),
    "the last layer empty": random_mask(6, empty_attention=(3,), empty_ffn=(3,)),
    "all empty": random_mask(7, empty_attention=(0, 1, 2, 3), empty_ffn=(0, 1, 2, 3)),
    "one channel left": dense_except(1, [0, 1, 2, 3], [5]),
    "one KV head left": dense_except(0, [3], list(range(CHANNELS))),
}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits `(windows, tokens, vocabulary)` of a forward pass."""
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def random_outputs(model: nn.Module, model_mask: ModelMask, bias: bool) -> Outputs:
    """Return a random output projection for every block that keeps at least one unit, dense blocks included."""
    generator, outputs = torch.Generator().manual_seed(0), {}
    for index, (layer, layer_mask) in enumerate(zip(model.model.layers, model_mask, strict=True)):
        for name, linear in (("attention", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):
            mask = layer_mask.of(name)
            if mask.any():
                inputs = int(mask.sum()) * linear.in_features // len(mask)
                weight = 0.3 * torch.randn(linear.out_features, inputs, generator=generator)
                outputs[index, name] = Output(weight, torch.randn(32, generator=generator) if bias else linear.bias)
    return outputs
