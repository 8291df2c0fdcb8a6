"""Layer after layer over all batches gives what the model's own forward gives."""

import pytest
import torch
from helpers.models import VOCABULARY, tiny_config, tiny_model
from torch import Tensor, nn

from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.model.prunable import PrunableModel

LAYERS = 4


def batches() -> list[Tensor]:
    """Of several shapes, most of them longer than the tiny Mistral's window of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 20), (1, 40), (2, 20), (3, 7))]


def hidden_states(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The input of every layer and, last, the output of the whole decoder."""
    with torch.no_grad():
        return list(model(input_ids=tokens, output_hidden_states=True).hidden_states)


def assert_streams(model: nn.Module) -> None:
    stream = start_layerwise(PrunableModel.of(model), batches())
    wanted = [hidden_states(model, tokens) for tokens in batches()]
    for index in range(LAYERS):
        for place, states in enumerate(wanted):
            torch.testing.assert_close(stream.hidden[place], states[index], rtol=1e-6, atol=1e-6)
        stream.advance(index)
    for place, states in enumerate(wanted):
        torch.testing.assert_close(model.model.norm(stream.hidden[place]), states[LAYERS], rtol=1e-6, atol=1e-6)


def test_the_stream_equals_the_models_forward(architecture: str) -> None:
    assert_streams(tiny_model(architecture))


def test_layers_with_masks_of_their_own_get_them() -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = tiny_config("qwen3").to_dict() | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    config = Qwen3Config(**sizes | {"layer_types": None})
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    assert_streams(model)
    masks = [
        call.kwargs["attention_mask"]
        for call in start_layerwise(PrunableModel.of(model), batches()).calls.of(batches()[0].shape)
    ]
    assert masks[3] is not None
    assert masks[0] is None or not torch.equal(masks[0], masks[3])


def test_watched_modules_show_their_inputs_of_every_batch(architecture: str) -> None:
    model = tiny_model(architecture)
    wanted: list[Tensor] = []
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: wanted.append(inputs[0]))
    with torch.no_grad():
        for tokens in batches():
            model(input_ids=tokens)
    handle.remove()
    stream = start_layerwise(PrunableModel.of(model), batches())
    seen: list[Tensor] = []
    stream.advance(0)
    stream.advance(1)
    stream.observe(2, {("mlp.down_proj",): seen.append})
    stream.advance(2, {("mlp.down_proj",): seen.append})
    for got, again, own in zip(seen[:4], seen[4:], wanted, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, own, rtol=1e-6, atol=1e-6)


def test_two_streams_run_side_by_side_while_weights_change() -> None:
    model, changed = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    dense = start_layerwise(PrunableModel.of(model), batches())
    pruned = dense.copy()
    for index in range(LAYERS):
        dense.advance(index)
        for each in (model, changed):
            each.model.layers[index].mlp.down_proj.weight[:, :12] = 0.0
        pruned.advance(index)
    whole = tiny_model("llama-gqa")
    for place, tokens in enumerate(batches()):
        for stream, reference in ((dense, whole), (pruned, changed)):
            torch.testing.assert_close(
                reference.model.norm(stream.hidden[place]), hidden_states(reference, tokens)[-1], rtol=1e-6, atol=1e-6
            )


def test_layers_are_taken_in_their_order_only() -> None:
    stream = start_layerwise(PrunableModel.of(tiny_model("mistral")), batches())
    with pytest.raises(ValueError, match="inputs of layer 0, not of layer 1"):
        stream.advance(1)
    stream.advance(0)
    with pytest.raises(ValueError, match="inputs of layer 1, not of layer 0"):
        stream.observe(0, {})


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no calibration text"):
        start_layerwise(PrunableModel.of(tiny_model("llama-mha")), [])


def test_hidden_states_are_plain_tensors_in_the_models_dtype() -> None:
    model = tiny_model("llama-mha").bfloat16()
    stream = start_layerwise(PrunableModel.of(model), batches())
    stream.advance(0)
    assert all(hidden.dtype == torch.bfloat16 and not hidden.is_inference() for hidden in stream.hidden)
    assert not any(hidden.requires_grad for hidden in stream.hidden)


def test_the_model_is_left_as_it_was_even_when_it_fails() -> None:
    model = tiny_model("qwen2")

    def own_forward(*args, **kwargs):
        return type(model.model.layers[1]).forward(model.model.layers[1], *args, **kwargs)

    model.model.layers[1].forward = own_forward
    with pytest.raises(IndexError):
        start_layerwise(PrunableModel.of(model), [torch.full((1, 4), VOCABULARY)])
    stream = start_layerwise(PrunableModel.of(model), batches())

    def refuse(_: Tensor) -> None:
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"):
        stream.observe(0, {("self_attn.o_proj",): refuse})
    assert not any(module._forward_pre_hooks for module in model.modules())
    forward_passes = [vars(layer).get("forward") for layer in model.model.layers]
    assert forward_passes == [None, own_forward, None, None]
