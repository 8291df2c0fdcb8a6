"""The student of a recovery: which of its weights are trained, how it computes, and what they are in the end.

Trained weights are float32. The others keep the dtype that they are loaded in, so that a large model trains with
adapters in little memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.forward.short_attention import LONGEST
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import RecoverSettings, Trained

ADAPTER = "default"
"""The name that peft gives to the only adapter of a model."""


def loaded_dtype(train: Trained, *, bfloat16: bool) -> str:
    """Return the dtype to load a student in: `auto`, as it is stored, where that saves much memory, else `float32`.

    bfloat16: whether matrix products are in bfloat16. Embeddings stay float32, and with them the residual stream, if
    all layers are trained: in bfloat16 they learn a little less.
    """
    return "auto" if bfloat16 and train in ("lora", "norms-and-outputs") else "float32"


def attends_plainly(settings: RecoverSettings, *, on_cpu: bool) -> bool:
    """Return whether the training computes attention by the plain formula, which keeps its weights.

    With gradient checkpointing the second pass over a layer would not see the mode that chooses the formula.
    """
    return on_cpu and settings.seqlen <= LONGEST and not settings.gradient_checkpointing


def trainable(model: PrunableModel, train: Trained, lora_rank: int) -> nn.Module:
    """Return the model with gradients on for what is trained, in float32, and off for everything else.

    train: `lora` wraps the model in peft's adapters of `lora_rank` for every linear layer but the head; for the others
    see `trained_names`.
    """
    module = model.module.requires_grad_(False)
    if train == "lora":
        from peft import LoraConfig, get_peft_model  # only adapters need peft

        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers 5.24 has deprecated
            return get_peft_model(module, config)
    names = set(trained_names(model, train))
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return module


def trained_names(model: PrunableModel, train: Trained) -> Iterator[str]:
    """Yield the names of the weights that are trained themselves, a tied one once. With `lora` there are none.

    train: `all` weights; those of the decoder `layers` and the final norm; or `norms-and-outputs`.
    """
    family = model.family
    if train == "norms-and-outputs":
        yield from norms_and_outputs(model)
    elif train != "lora":
        for name, _ in model.module.named_parameters():
            if train == "all" or name.startswith((f"{family.layers}.", f"{family.final_norm}.")):
                yield name


def norms_and_outputs(model: PrunableModel) -> Iterator[str]:
    """Yield the names of the norms' weights and of the output projections (attention o, FFN down) with their biases."""
    family = model.family
    for index, layer in enumerate(model.layers):
        prefix = f"{family.layers}.{index}"
        for block in family.blocks_of(layer):
            outputs = (*family.output_weights(block), f"{block.module}.{block.output_bias}")
            yield from (f"{prefix}.{name}" for name, _ in layer.named_parameters() if name in outputs)
        for path, module in layer.named_modules(prefix=prefix):
            vectors = [parameter for parameter in module.parameters() if parameter.dim() == 1]
            if not any(module.children()) and len(vectors) == len(list(module.parameters())):  # nothing else has those
                yield from (f"{path}.{name}" for name, _ in module.named_parameters())
    for name, _ in model.final_norm.named_parameters(family.final_norm):
        yield name


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with gradients by name. A tied one is there once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what has been trained as tensors on the CPU, by the names of the model that `trainable` was given.

    Adapters are merged into their weights: added in float32, then rounded to the dtype of the weight.
    """
    causal: Any = model
    if not hasattr(model, "peft_config"):
        return {name: parameter.detach().float().cpu() for name, parameter in trained_parameters(model).items()}
    merged = {}
    with torch.no_grad():
        for name, layer in causal.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight") and ADAPTER in layer.lora_A:
                weight = layer.get_base_layer().weight
                merged[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(ADAPTER)).to(weight.dtype).cpu()
    return merged
