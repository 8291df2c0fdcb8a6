"""What a forward pass may not do inside a step: read a value back from the device, or make all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.masks import MODEL_MASKS, random_repair, random_tokens
from helpers.memory import Allocations
from helpers.models import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pgprune_cli.forward.masked import LOGIT_ROWS, SOFTMAX_ROWS, Evaluator, summed_loss
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,  # item(), float(), bool(), tolist() of one value
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,  # its result's size is a value
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
}


class Reads(TorchDispatchMode):
    """While inside, an operator for which the host waits for the device is an error, on whatever device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} makes the host wait for the device"
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


@pytest.mark.parametrize(
    "read", [Tensor.sum, lambda x: float(x[0]), lambda x: x[0].item(), lambda x: bool(x.any()), Tensor.nonzero]
)
def test_what_reads_a_value_is_seen(read: Callable[[Tensor], object]) -> None:
    if read is Tensor.sum:
        with Reads():
            read(torch.ones(3))
        return
    with pytest.raises(AssertionError, match="makes the host wait"), Reads():
        read(torch.ones(3))


@pytest.mark.parametrize("weights", ["dtype", "int8", "fp8"])
@pytest.mark.parametrize("name", ["dense", "random", "an empty layer"])
@pytest.mark.parametrize("with_repair", [False, True], ids=["as it is", "repaired"])
def test_a_forward_reads_no_value_back(name: str, with_repair: bool, weights: str, architecture: str) -> None:
    model, tokens = tiny_model(architecture), random_tokens()
    keep = MODEL_MASKS[name](model)
    repaired = random_repair(model, keep, bias=True) if with_repair else {}
    if weights != "dtype":
        quantize_projections(model, weights)
    with Evaluator(PrunableModel.of(model)).shrunk(keep, repaired):
        expected = summed_loss(model, tokens)
        with Reads():
            loss = summed_loss(model, tokens)
    assert torch.equal(loss, expected)


def wide_model(vocabulary: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def test_of_a_large_vocabulary_only_some_logits_exist_at_a_time() -> None:
    vocabulary, windows, length = 128_256, 9, 129
    model = wide_model(vocabulary)
    tokens = torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    with Allocations() as seen:
        summed_loss(model, tokens)
    assert windows * (length - 1) > 2 * LOGIT_ROWS
    logits, in_float32 = 2 * LOGIT_ROWS * vocabulary, 4 * SOFTMAX_ROWS * vocabulary
    assert seen.largest == logits
    assert logits + 2 * in_float32 < seen.peak < 1.02 * (logits + 2 * in_float32)


def test_nothing_the_size_of_the_weights_is_copied() -> None:
    """A step allocates one block's slices at a time, with repaired projections too, and no copy of dense weights."""
    model = tiny_model("llama-mha")
    keep, tokens = MODEL_MASKS["random"](model), random_tokens()[:1, :4]
    repaired = random_repair(model, keep, bias=False)
    evaluator = Evaluator(PrunableModel.of(model))
    block = max(sum(parameter.nbytes for parameter in part.parameters()) for part in model.model.layers[0].children())
    with Allocations() as seen:
        evaluator.losses([keep] * 3, tokens, [repaired] * 3)
    assert seen.peak < block + 16_000 < sum(parameter.nbytes for parameter in model.parameters()) / 3
