"""A model whose elements lie in the order of a width search computes the same, and is put back afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.blocks import model_unchanged
from helpers.masks import is_refused, logits_of, random_tokens
from helpers.memory import Allocations
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, tiny_model
from helpers.units import chain_units, ranks_of
from torch import Tensor, nn

from pgprune_cli.core.grid import element_order
from pgprune_cli.forward import shrunk_block
from pgprune_cli.forward.element_order import ElementOrders, elements_in_order
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import LayerMask, ModelMask, RepairedBlock, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections
from pgprune_cli.model.unit_tensors import FirstElements, KeptElements

SHARES = ((0.3, 0.7), (1.0, 0.5), (0.6, 1.0), (0.1, 0.2))
"""Of the units of attention and of the FFN, what the layers keep."""


def chains(model: nn.Module) -> tuple[ElementOrders, ModelMask]:
    """Return the orders of random chains, and a mask of some widths along them."""
    shape = PrunableModel.of(model).shape
    families = [name for name in ("attention", "ffn") if not is_refused(model, name)]
    _, units = chain_units(shape, families)
    ranks = ranks_of(shape, units)
    orders, masks = {}, []
    for index, shares in enumerate(SHARES):
        layer = LayerMask(*(torch.ones(shape.grids[name][index].elements, dtype=torch.bool) for name in shape.grids))
        for name, share in zip(("attention", "ffn"), shares, strict=True):
            if name not in families:
                continue
            partition, order = units[index, name], ranks[index, name].argsort(descending=True)
            orders[index, name] = element_order(partition, order, shape.grids[name][index])
            kept = torch.zeros(len(order), dtype=torch.bool)
            kept[order[: max(1, round(share * len(order)))]] = True
            layer = replace(layer, **{name: kept[partition]})
        masks.append(layer)
    return orders, tuple(masks)


def columns_in(order: Tensor, mask: Tensor, width: int) -> Tensor:
    """Return where the kept columns lie in the order, among the kept ones in ascending order."""
    place = mask.cumsum(0)[order[mask[order]]] - 1
    return (place[:, None] * width + torch.arange(width)).flatten()


def refitted(model: nn.Module, orders: ElementOrders, model_mask: ModelMask) -> tuple[RepairedBlocks, RepairedBlocks]:
    """Return random repairs of the dense blocks as the model lies, and the same in the orders."""
    prunable, generator = PrunableModel.of(model), torch.Generator().manual_seed(0)
    plain, ordered = {}, {}
    for (index, name), order in orders.items():
        layer, block = prunable.layers[index], prunable.shape.blocks[index][name]
        mask = model_mask[index].of(name)
        if mask.all() or prunable.family.groups_per_token(layer, block) is not None:
            continue
        linear = block.output_linear(layer)
        width = linear.in_features // len(mask)
        weight = 0.3 * torch.randn(linear.out_features, int(mask.sum()) * width, generator=generator)
        plain[index, name] = RepairedBlock(weight, linear.bias)
        ordered[index, name] = RepairedBlock(weight[:, columns_in(order, mask, width)], linear.bias)
    return plain, ordered


def losses_both_ways(model: nn.Module, *, repairs: bool) -> tuple[Tensor, Tensor]:
    """Return the loss of a mask along the orders from gathered weights, and from prefixes."""
    orders, model_mask = chains(model)
    plain, ordered = refitted(model, orders, model_mask) if repairs else ({}, {})
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses([model_mask], tokens, [plain])
    with evaluator.in_order(orders):
        got = evaluator.losses([model_mask], tokens, [ordered])
    return got, expected


@pytest.mark.parametrize("repairs", [False, True], ids=["unrepaired", "repaired"])
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, *EXPERT_ARCHITECTURES))
def test_prefixes_compute_the_losses_of_gathered_weights(architecture: str, repairs: bool) -> None:
    model = tiny_model(architecture)
    with model_unchanged(model):
        got, expected = losses_both_ways(model, repairs=repairs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("repairs", [False, True], ids=["unrepaired", "repaired"])
@pytest.mark.parametrize("architecture", ["llama-mha", "llama-gqa", "llama-biased", "mistral", "qwen3", "phi3"])
@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_prefixes_of_rounded_weights_compute_the_losses_of_gathered_ones(
    architecture: str, weight_format: str, repairs: bool
) -> None:
    model = tiny_model(architecture)
    if weight_format == "fp8":
        model = model.to(torch.bfloat16)
    quantize_projections(model, weight_format)
    with model_unchanged(model):
        got, expected = losses_both_ways(model, repairs=repairs)
    # bfloat16 rounds every sum, and another order gives other sums.
    torch.testing.assert_close(got, expected, rtol=1e-6 if weight_format == "int8" else 2e-2, atol=0)


@pytest.mark.parametrize("architecture", ("llama-mha", "llama-gqa", "qwen3_5_text", "mixtral", "gpt_oss"))
def test_dense_model_computes_the_same_in_another_order(architecture: str) -> None:
    model, tokens = tiny_model(architecture), random_tokens()
    orders, _ = chains(model)
    expected = logits_of(model, tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with elements_in_order(PrunableModel.of(model), orders):
        torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def record_values(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor, Tensor]]:
    """Record the name, the dense values and the kept values of every tensor that a block runs on."""
    recorded, original = [], shrunk_block._kept_values

    def kept_values(module: nn.Module, tensor, kept):
        values = original(module, tensor, kept)
        recorded.append((tensor.name, module.get_parameter(tensor.name).data, values))
        return values

    monkeypatch.setattr(shrunk_block, "_kept_values", kept_values)
    return recorded


def test_widths_are_views_without_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-mha")
    orders, model_mask = chains(model)
    recorded = record_values(monkeypatch)
    evaluator = Evaluator(PrunableModel.of(model))
    with evaluator.in_order(orders):
        with pytest.MonkeyPatch.context() as no_gathering:
            no_gathering.setattr(KeptElements, "rows_of", None)
            evaluator.losses([model_mask], random_tokens())
        names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert {name.removesuffix(".weight") for name, *_ in recorded} == names
        for name, dense, values in recorded:
            assert values.data_ptr() == dense.data_ptr(), name
            assert (values.T if name in ("o_proj.weight", "down_proj.weight") else values).is_contiguous(), name


def test_keys_and_values_of_first_heads_are_views_and_queries_are_copied_run_by_run(monkeypatch) -> None:
    """Each of 2 of 4 KV heads keeps one query head of two: rows 0 to 8 and 16 to 24 of the ordered queries."""
    model = tiny_model("llama-gqa")
    prunable = PrunableModel.of(model)
    order = torch.tensor([5, 4, 1, 0, 2, 3, 7, 6])
    mask = torch.zeros(8, dtype=torch.bool)
    mask[[5, 1]] = True
    model_mask = tuple(
        replace(layer, attention=mask) if index == 1 else layer for index, layer in enumerate(prunable.shape.all_kept())
    )
    recorded = record_values(monkeypatch)
    evaluator, tokens = Evaluator(prunable), random_tokens()
    expected = evaluator.losses([model_mask], tokens)
    recorded.clear()
    with evaluator.in_order({(1, "attention"): order}):
        torch.testing.assert_close(evaluator.losses([model_mask], tokens), expected, rtol=1e-6, atol=0)
        values = {name: (dense, kept) for name, dense, kept in recorded}
        for name in ("k_proj.weight", "v_proj.weight"):
            dense, kept = values[name]
            assert kept.data_ptr() == dense.data_ptr() and kept.shape == (16, 32)
        queries, kept = values["q_proj.weight"]
        assert torch.equal(kept, torch.cat([queries[:8], queries[16:24]]))


def test_mask_that_is_no_prefix_is_gathered_from_the_ordered_weights() -> None:
    model = tiny_model("llama-gqa")
    orders, model_mask = chains(model)
    other = tuple(replace(layer, ffn=layer.ffn.flip(0)) for layer in model_mask)
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses([other], tokens)
    with evaluator.in_order(orders):
        torch.testing.assert_close(evaluator.losses([other], tokens), expected, rtol=1e-6, atol=0)
    assert torch.equal(evaluator.losses([other], tokens), expected)


@pytest.mark.parametrize("architecture", ["llama-gqa", "phi3", "mixtral", "gpt_oss"])
def test_reordering_takes_the_memory_of_two_tensors_at_most(architecture: str) -> None:
    model = tiny_model(architecture)
    prunable, (orders, _) = PrunableModel.of(model), chains(model)
    for (index, name), order in orders.items():
        module = prunable.layers[index].get_submodule(prunable.shape.blocks[index][name].module)
        largest = max(parameter.nbytes for parameter in module.parameters())
        with Allocations() as seen, elements_in_order(prunable, {(index, name): order}):
            pass
        assert largest <= seen.peak < 2.4 * largest  # indices included


@pytest.mark.parametrize("architecture", ("llama-biased", "mixtral", "qwen3_5_text"))
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_order_is_put_back_when_the_body_raises(architecture: str, error: type[BaseException]) -> None:
    model = tiny_model(architecture)
    orders, _ = chains(model)
    evaluator = Evaluator(PrunableModel.of(model))
    with model_unchanged(model), pytest.raises(error), evaluator.in_order(orders):
        raise error
    assert evaluator._orders == {}


def test_order_is_put_back_when_reordering_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    orders, _ = chains(model)
    calls: list[object] = []
    rows_of = KeptElements.rows_of

    def fails_tenth(self: KeptElements, values: Tensor, tensor: object) -> Tensor:
        calls.append(tensor)
        if len(calls) == 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows_of(self, values, tensor)

    with model_unchanged(model):
        monkeypatch.setattr(KeptElements, "rows_of", fails_tenth)
        with pytest.raises(torch.OutOfMemoryError), elements_in_order(PrunableModel.of(model), orders):
            raise AssertionError("not reached")
    assert len(calls) == 10 + 9


def test_first_elements_of_a_whole_tensor_are_the_tensor() -> None:
    grid = PrunableModel.of(tiny_model("llama-gqa")).shape.grids["attention"][0]
    values = torch.randn(64, 32)
    prunable = PrunableModel.of(tiny_model("llama-gqa"))
    queries: Sequence = prunable.family.unit_tensors(prunable.layers[0], prunable.family.attention)
    kept = FirstElements(grid, grid.groups, grid.members).rows_of(values, queries[0])
    assert kept.data_ptr() == values.data_ptr() and torch.equal(kept, values)


def test_a_mask_that_was_a_prefix_is_none_in_another_order() -> None:
    model = tiny_model("llama-gqa")
    orders, model_mask = chains(model)
    evaluator, tokens = Evaluator(PrunableModel.of(model)), random_tokens()
    expected = evaluator.losses([model_mask], tokens)
    reversed_orders = {key: order.flip(0) for key, order in orders.items()}
    for each in (orders, orders, reversed_orders, {}):
        with evaluator.in_order(each):
            torch.testing.assert_close(evaluator.losses([model_mask], tokens), expected, rtol=1e-6, atol=0)
