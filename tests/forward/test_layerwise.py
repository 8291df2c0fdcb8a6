"""A layer-wise run over all batches computes what the model's own forward pass computes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers.models import VOCABULARY, tiny_config, tiny_model
from torch import Tensor, nn

from pgprune_cli.forward.layerwise import ModuleCall, start_layerwise
from pgprune_cli.model.prunable import PrunableModel

LAYERS = 4


def batches() -> list[Tensor]:
    """Return batches of several shapes, most of them longer than the tiny Mistral's window of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 20), (1, 40), (2, 20), (3, 7))]


def hidden_states(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Return the input of every layer and, last, the output of the whole decoder."""
    with torch.no_grad():
        return list(model(input_ids=tokens, output_hidden_states=True).hidden_states)


def assert_layerwise_equals_forward(model: nn.Module) -> None:
    run = start_layerwise(PrunableModel.of(model), batches())
    expected = [hidden_states(model, tokens) for tokens in batches()]
    for index in range(LAYERS):
        for place, states in enumerate(expected):
            torch.testing.assert_close(run.hidden_states[place], states[index], rtol=1e-6, atol=1e-6)
        run.advance(index)
    for place, states in enumerate(expected):
        final = PrunableModel.of(model).final_norm(run.hidden_states[place])
        torch.testing.assert_close(final, states[LAYERS], rtol=1e-6, atol=1e-6)


def test_layerwise_run_equals_the_models_forward_pass(architecture: str) -> None:
    assert_layerwise_equals_forward(tiny_model(architecture))


def test_layers_with_sliding_windows_get_their_own_masks() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = tiny_config("qwen3").to_dict() | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    config = Qwen3Config(**sizes | {"layer_types": None})
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    assert_layerwise_equals_forward(model)
    masks = [
        call.kwargs["attention_mask"]
        for call in start_layerwise(PrunableModel.of(model), batches()).calls.for_shape(batches()[0].shape)
    ]
    assert masks[3] is not None
    assert masks[0] is None or not torch.equal(masks[0], masks[3])


def test_observers_get_the_inputs_of_every_batch(architecture: str) -> None:
    model = tiny_model(architecture)
    expected: list[Tensor] = []
    prunable = PrunableModel.of(model)
    path = prunable.family.ffn.output_path
    output = prunable.layers[2].get_submodule(path)
    handle = output.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    with torch.no_grad():
        for tokens in batches():
            model(input_ids=tokens)
    handle.remove()
    run = start_layerwise(PrunableModel.of(model), batches())
    inputs: list[Tensor] = []
    run.advance(0)
    run.advance(1)
    run.observe(2, {(path,): inputs.append})
    run.advance(2, {(path,): inputs.append})
    for observed, again, own in zip(inputs[:4], inputs[4:], expected, strict=True):
        assert torch.equal(observed, again)
        torch.testing.assert_close(observed, own, rtol=1e-6, atol=1e-6)


def test_watchers_see_every_call_of_a_module_as_the_layer_makes_it(architecture: str) -> None:
    model = tiny_model(architecture)
    prunable = PrunableModel.of(model)
    run, calls = start_layerwise(prunable, batches()), []
    run.advance(0)
    path = prunable.family.blocks_of(prunable.layers[1])[0].module
    module = prunable.layers[1].get_submodule(path)
    run.observe(1, {}, {path: calls.append})
    assert [len(call.inputs) for call in calls] == [len(tokens) for tokens in batches()]
    for call in calls:
        with torch.no_grad():
            again = module(call.inputs, *call.args, **call.kwargs)
        assert torch.equal(again[0] if isinstance(again, tuple) else again, call.output)
        assert not call.output.requires_grad
    for windows in (1, 2, 5):  # the last are more than a batch has
        told = run.call(1, path, windows)
        assert told.inputs.shape == (windows, *calls[0].inputs.shape[1:])
        torch.testing.assert_close(told.inputs[:1], calls[0].inputs[:1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(told.output[-1:], calls[0].output[:1], rtol=1e-4, atol=1e-5)
    assert run.position == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_watchers_see_each_window_once_when_memory_runs_out() -> None:
    model = tiny_model("mistral")
    run, calls = start_layerwise(PrunableModel.of(model), batches()), []
    newest: list[weakref.ref[Tensor]] = []
    failed: list[weakref.ref[Tensor]] = []

    def begin(_: nn.Module, __: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        assert all(tensor() is None for tensor in failed), "a failed attempt still holds memory"
        newest.append(weakref.ref(arguments["hidden_states"]))

    def fail(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 1:  # behind the attention, which has been called by then
            failed.append(newest[-1])
            raise torch.OutOfMemoryError("CUDA out of memory")

    first = model.model.layers[0]
    begun = first.self_attn.register_forward_pre_hook(begin, with_kwargs=True)
    handle = first.mlp.register_forward_pre_hook(fail)
    run.observe(0, {}, {"self_attn": calls.append})
    assert [len(call.inputs) for call in calls] == [1] * sum(map(len, batches()))
    with pytest.raises(torch.OutOfMemoryError):
        run.call(0, "self_attn", 2)
    assert isinstance(run.call(0, "self_attn", 1), ModuleCall)
    assert failed
    begun.remove()
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_run_in_order_only() -> None:
    run = start_layerwise(PrunableModel.of(tiny_model("mistral")), batches())
    with pytest.raises(ValueError, match="inputs of layer 0, not of layer 1"):
        run.advance(1)
    run.advance(0)
    with pytest.raises(ValueError, match="inputs of layer 1, not of layer 0"):
        run.observe(0, {})
    with pytest.raises(ValueError, match="inputs of layer 1, not of layer 3"):
        run.call(3, "mlp", 1)


def test_layerwise_run_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no calibration text"):
        start_layerwise(PrunableModel.of(tiny_model("llama-mha")), [])


def test_hidden_states_are_plain_tensors_in_the_models_dtype() -> None:
    model = tiny_model("llama-mha").bfloat16()
    run = start_layerwise(PrunableModel.of(model), batches())
    run.advance(0)
    assert all(hidden.dtype == torch.bfloat16 and not hidden.is_inference() for hidden in run.hidden_states)
    assert not any(hidden.requires_grad for hidden in run.hidden_states)


def test_model_is_unchanged_when_an_observer_fails() -> None:
    model = tiny_model("qwen2")

    def own_forward(*args, **kwargs):
        return type(model.model.layers[1]).forward(model.model.layers[1], *args, **kwargs)

    model.model.layers[1].forward = own_forward
    with pytest.raises(IndexError):
        start_layerwise(PrunableModel.of(model), [torch.full((1, 4), VOCABULARY)])
    run = start_layerwise(PrunableModel.of(model), batches())

    def refuse(_: Tensor) -> None:
        raise RuntimeError("observed")

    with pytest.raises(RuntimeError, match="observed"):
        run.observe(0, {("self_attn.o_proj",): refuse})
    assert not any(module._forward_pre_hooks for module in model.modules())
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    assert forwards == [None, own_forward, None, None]
