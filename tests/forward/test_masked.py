"""The shrunk model equals the dense one with removed units silenced, and the model is unchanged after every call."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
import torch
from helpers.masks import (
    MODEL_MASKS,
    dense_except,
    dense_mask,
    is_dense,
    logits_of,
    random_mask,
    random_repair,
    random_tokens,
    repaired_by_hand,
)
from helpers.masks import masked as silenced
from helpers.models import ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward import masked as masked
from pgprune_cli.forward.masked import Evaluator, shrink, summed_loss
from pgprune_cli.model import unit_tensors
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import kept_shape


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor], pointers: dict[str, int]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request) -> nn.Module:
    return tiny_model(request.param)


@pytest.fixture
def watched(model: nn.Module) -> Iterator[nn.Module]:
    """A model that the test must leave unchanged."""
    before, pointers = snapshot(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    logits = logits_of(model, random_tokens())
    yield model
    assert_untouched(model, before, pointers)
    assert torch.equal(logits_of(model, random_tokens()), logits)


@pytest.mark.parametrize("name", MODEL_MASKS)
def test_shrunk_model_equals_the_dense_one_with_removed_units_silenced(watched: nn.Module, name: str) -> None:
    model_mask, tokens = MODEL_MASKS[name](watched), random_tokens()
    with silenced(watched, model_mask):
        expected = logits_of(watched, tokens)
    with Evaluator(PrunableModel.of(watched)).shrunk(model_mask) as shrunk:
        got = logits_of(shrunk, tokens)
        again = logits_of(shrunk, tokens)
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)
    assert torch.equal(got, again)
    if not is_dense(model_mask):
        assert (got - logits_of(watched, tokens)).abs().max() > 1e-2


def test_removed_elements_are_not_computed(watched: nn.Module) -> None:
    """They are not just masked: the products are those of the smaller matrices."""
    model, seen = PrunableModel.of(watched), {}
    model_mask = dense_except(watched, 1, (2, 1), 3)
    layer = model.layers[1]

    def look(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        seen[name] = tuple(module.weight.shape)

    handles, expected = [], {}
    for block in model.family.blocks_of(layer):
        for tensor in model.family.unit_tensors(layer, block):
            linear = layer.get_submodule(f"{block.module}.{tensor.module}".rstrip("."))
            if tensor.key == "weight" and isinstance(linear, nn.Linear):
                expected[tensor.module] = tuple(kept_shape(tensor, linear.weight.shape, model_mask[1].of(block.name)))
                handles.append(linear.register_forward_pre_hook(partial(look, name=tensor.module)))
    with Evaluator(model).shrunk(model_mask):
        logits_of(watched, random_tokens())
    for handle in handles:
        handle.remove()
    assert seen == expected
    if model.config.model_type == "llama" and model.shape.grids["attention"][1].members == 2:
        assert seen == {
            "q_proj": (16, 32),  # one of two query heads for each of two KV heads
            "k_proj": (16, 32),
            "v_proj": (16, 32),
            "o_proj": (32, 16),
            "gate_proj": (3, 32),
            "up_proj": (3, 32),
            "down_proj": (32, 3),
        }


@pytest.mark.parametrize("bias", [False, True], ids=["without a bias", "with a bias"])
@pytest.mark.parametrize("name", ["dense", "random", "an empty layer", "one channel left", "one query head left"])
def test_repaired_weights_replace_those_of_the_model(watched: nn.Module, name: str, bias: bool) -> None:
    model_mask, tokens = MODEL_MASKS[name](watched), random_tokens()
    repaired = random_repair(watched, model_mask, bias)
    by_hand = repaired_by_hand(watched, model_mask, repaired)
    with silenced(by_hand, model_mask):
        expected = logits_of(by_hand, tokens)
    with Evaluator(PrunableModel.of(watched)).shrunk(model_mask, repaired) as shrunk:
        got = logits_of(shrunk, tokens)
        again = logits_of(shrunk, tokens)
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)  # a norm behind a block magnifies rounding
    assert torch.equal(got, again)
    with Evaluator(PrunableModel.of(watched)).shrunk(model_mask) as unrepaired:
        assert (got - logits_of(unrepaired, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["dense", "random", "an empty layer", "one channel left"])
def test_model_shrunk_for_good_computes_the_same_without_gathering(model: nn.Module, name: str, monkeypatch) -> None:
    model_mask, tokens, own = MODEL_MASKS[name](model), random_tokens(), copy.deepcopy(model)
    repaired = random_repair(model, model_mask, bias=True)
    with Evaluator(PrunableModel.of(own)).shrunk(model_mask, repaired):
        expected = logits_of(own, tokens)
    before = sum(parameter.numel() for parameter in own.parameters())
    shrink(PrunableModel.of(own), model_mask, repaired)
    monkeypatch.setattr(unit_tensors, "gather", None)
    assert torch.equal(logits_of(own, tokens), expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in own.modules())
    if not is_dense(model_mask):
        assert sum(parameter.numel() for parameter in own.parameters()) < before


def test_losses_use_the_repaired_weights_of_each_mask(watched: nn.Module) -> None:
    tokens = random_tokens()
    model_masks = [MODEL_MASKS[name](watched) for name in ("random", "an empty layer")]
    repaired = [random_repair(watched, model_mask, bias=True) for model_mask in model_masks]
    alone = []
    for model_mask, own in zip(model_masks, repaired, strict=True):
        with Evaluator(PrunableModel.of(watched)).shrunk(model_mask, own):
            alone.append(direct_loss(watched, tokens))
    assert Evaluator(PrunableModel.of(watched)).losses(model_masks, tokens, repaired).tolist() == pytest.approx(
        alone, rel=1e-4
    )


PLACES = ("attention output", "FFN output", "FFN input")


def place_in(model: nn.Module, place: str) -> nn.Module:
    """Return a module of layer 3 that runs while the dense weights are swapped out."""
    prunable = PrunableModel.of(model)
    block, _, end = place.partition(" ")
    block = prunable.family.attention if block == "attention" else prunable.family.ffn
    projection = block.projections[-1 if end == "output" else 0]
    return prunable.layers[3].get_submodule(f"{block.module}.{projection}")


@pytest.mark.parametrize("place", PLACES)
def test_model_is_restored_when_a_forward_pass_with_repaired_weights_fails(watched: nn.Module, place: str) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model_mask = random_mask(watched, 8)
    repaired = random_repair(watched, model_mask, bias=True)
    handle = place_in(watched, place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Evaluator(PrunableModel.of(watched)).losses([model_mask], random_tokens(), [repaired])
    handle.remove()


def shrunk_to(model: nn.Module, name: str) -> AbstractContextManager[nn.Module]:
    return Evaluator(PrunableModel.of(model)).shrunk(MODEL_MASKS[name](model))


def test_model_is_restored_when_the_body_raises(watched: nn.Module) -> None:
    with pytest.raises(KeyError), shrunk_to(watched, "an empty layer"):
        logits_of(watched, random_tokens())
        raise KeyError


@pytest.mark.parametrize("place", PLACES)
def test_model_is_restored_when_a_block_fails_halfway(watched: nn.Module, place: str) -> None:
    """The dense weights are swapped out at that moment; the caller may catch the error and continue."""
    module = place_in(watched, place)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    before, pointers = snapshot(watched), {name: p.data_ptr() for name, p in watched.named_parameters()}
    with Evaluator(PrunableModel.of(watched)).shrunk(random_mask(watched, 8)):
        with pytest.raises(RuntimeError, match="out of memory"):
            logits_of(watched, random_tokens())
        inside = watched.state_dict()
        assert all(torch.equal(inside[name], value) for name, value in before.items())
        handle.remove()
        logits_of(watched, random_tokens())
    assert_untouched(watched, before, pointers)


def test_model_is_restored_when_gathering_fails(watched: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third matrix of a block does not fit after two have been swapped."""
    calls = []

    def fails_third(*arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return gather(*arguments)

    gather = unit_tensors.gather
    monkeypatch.setattr(unit_tensors, "gather", fails_third)
    evaluator = Evaluator(PrunableModel.of(watched))
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.losses([random_mask(watched, 9)], random_tokens())
    assert len(calls) == 3


def test_model_is_restored_when_losses_fail(watched: nn.Module) -> None:
    with pytest.raises(IndexError):
        Evaluator(PrunableModel.of(watched)).losses([random_mask(watched, 0)], torch.full((1, 5), VOCABULARY))


@contextmanager
def memory_for(model: nn.Module, windows: int) -> Iterator[list[int]]:
    """Inside, a forward pass of more windows than this runs out of memory in the third layer. Yields all sizes."""
    sizes = []

    def fail(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > windows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    prunable = PrunableModel.of(model)
    attention = prunable.shape.blocks[2]["attention"]
    handle = attention.output_linear(prunable.layers[2]).register_forward_pre_hook(fail)
    try:
        yield sizes
    finally:
        handle.remove()


def test_batch_runs_in_parts_when_memory_runs_out(watched: nn.Module) -> None:
    tokens = random_tokens(rows=7)
    model_masks = [MODEL_MASKS[name](watched) for name in ("random", "another random")]
    repaired = [random_repair(watched, model_mask, bias=False) for model_mask in model_masks]
    expected = Evaluator(PrunableModel.of(watched)).losses(model_masks, tokens, repaired)
    evaluator = Evaluator(PrunableModel.of(watched))
    with memory_for(watched, 2) as sizes:
        losses = evaluator.losses(model_masks, tokens, repaired)
        evaluator.losses(model_masks[:1], tokens[:1])
    assert sizes == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1, 1]  # no other part fails
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_batch_runs_in_parts_when_memory_runs_out_while_gathering(
    watched: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two matrices of the block are swapped by then, and the retry must not gather from them."""
    calls = []

    def fails_third(*arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gather(*arguments)

    model_mask, tokens, gather = random_mask(watched, 9), random_tokens(), unit_tensors.gather
    expected = Evaluator(PrunableModel.of(watched)).losses([model_mask], tokens)
    monkeypatch.setattr(unit_tensors, "gather", fails_third)
    torch.testing.assert_close(
        Evaluator(PrunableModel.of(watched)).losses([model_mask], tokens), expected, rtol=1e-6, atol=0
    )


def test_one_window_that_does_not_fit_is_an_error(watched: nn.Module) -> None:
    with memory_for(watched, 0), pytest.raises(RunError, match="out of memory with one window at a time"):
        Evaluator(PrunableModel.of(watched)).losses([random_mask(watched, 0)], random_tokens())


def direct_loss(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean next-token loss from all logits at once, in float64."""
    logits = logits_of(model, tokens).double()[:, :-1]
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    return float(-log_probabilities.gather(-1, tokens[:, 1:, None]).mean())


def test_losses_are_the_mean_next_token_cross_entropy_under_each_mask(watched: nn.Module) -> None:
    tokens = random_tokens(seed=1)
    model_masks = [MODEL_MASKS[name](watched) for name in ("dense", "random", "an empty layer")]
    expected = []
    for model_mask in model_masks:
        with silenced(watched, model_mask):
            expected.append(direct_loss(watched, tokens))
    losses = Evaluator(PrunableModel.of(watched)).losses(model_masks, tokens)
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert len(set(losses.tolist())) == 3


def test_losses_do_not_depend_on_how_many_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama-gqa"), random_tokens()
    whole = summed_loss(model, tokens)
    for rows in (1, 7, 69, 1000):
        for name, value in (("LOGIT_ROWS", rows), ("SOFTMAX_ROWS", 5)):
            monkeypatch.setattr(masked, name, value)
        assert float(summed_loss(model, tokens)) == pytest.approx(float(whole), rel=1e-5)


def test_loss_of_a_batch_is_the_mean_over_its_windows() -> None:
    model, tokens = tiny_model("qwen3"), random_tokens()
    evaluator, model_mask = Evaluator(PrunableModel.of(model)), MODEL_MASKS["random"](model)
    alone = [float(evaluator.losses([model_mask], row[None])) for row in tokens]
    assert float(evaluator.losses([model_mask], tokens)) == pytest.approx(sum(alone) / 3, rel=1e-4)


def test_loss_that_overflows_is_returned_as_it_is() -> None:
    model = tiny_model("llama-mha")
    model.model.layers[1].mlp.down_proj.weight[0, 3] = torch.inf
    broken, sound = Evaluator(PrunableModel.of(model)).losses(
        [dense_mask(model), dense_except(model, 1, 4, 3)], random_tokens()
    )
    assert not broken.isfinite()
    assert sound.isfinite()


def test_masks_evaluated_in_turn_do_not_affect_each_other() -> None:
    model, tokens = tiny_model("qwen2"), random_tokens()
    evaluator = Evaluator(PrunableModel.of(model))
    model_masks = [make(model) for make in MODEL_MASKS.values()]
    forward = evaluator.losses(model_masks, tokens)
    backward = evaluator.losses(model_masks[::-1], tokens)
    assert torch.equal(forward, backward.flip(0))


def test_loss_is_the_same_when_transformers_cannot_be_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers without the function needs no patch: the loss must not depend on it."""
    from transformers import masking_utils

    model, tokens = tiny_model("mistral"), random_tokens()
    expected = summed_loss(model, tokens)
    original = masking_utils.find_packed_sequence_indices
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with masked._one_sequence_per_row():
        assert not hasattr(masking_utils, "find_packed_sequence_indices")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", original, raising=False)
    assert torch.equal(summed_loss(model, tokens), expected)
