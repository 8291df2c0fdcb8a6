"""What is special about Qwen3.5: DeltaNets, output gates, a cache that must count tokens, and what it has besides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.exports import export
from helpers.masks import draw, logits_of, masked, random_tokens
from helpers.medium import medium_recipe, random_batches
from helpers.memory import Allocations
from helpers.models import save_tokenizer, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pgprune_cli.estimate.memory import layer_bytes
from pgprune_cli.estimate.sizes import Sizes
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.model.families.wrapper import decoder_name
from pgprune_cli.model.loading import check_prunable, load_prunable
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.search.costs import flops, kv_cache

GENERATE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
EQUAL = [(2, 20), (2, 20), (2, 20), ((3, 1), 20)]
UNEQUAL = [((3, 1), 9), (1, 24), (0, 5), ((2, 1), 0)]


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_key_head_has_its_rows_of_all_tensors_and_consecutive_value_heads() -> None:
    """The model with the output of a key head's value heads set to zero does not depend on the head's other rows."""
    model = tiny_model("qwen3_5_text")
    prunable = PrunableModel.of(model)
    mask = draw(model, [(2, 24), (4, 24), (4, 24), (4, 24)])
    with masked(model, mask):
        expected = logits_of(model, random_tokens())
        layer, block = prunable.layers[0], prunable.shape.blocks[0]["attention"]
        for tensor in prunable.family.unit_tensors(layer, block)[:-1]:
            owner = layer.get_submodule(f"{block.module}.{tensor.module}" if tensor.module else block.module)
            for part, rows in zip(
                tensor.parts,
                owner.get_parameter(tensor.key).data.split([part.rows for part in tensor.parts]),
                strict=True,
            ):
                runs = rows.unflatten(0, (part.runs, part.width))
                runs[~mask[0].attention] = torch.randn_like(runs[~mask[0].attention])
        assert torch.equal(logits_of(model, random_tokens()), expected)


def test_states_of_constant_size_and_their_updates_are_counted() -> None:
    """A key head has 2 value heads with states of 8 x 8 numbers, and 32 rows in a convolution over 4 tokens."""
    model = PrunableModel.of(tiny_model("qwen3_5_text"))
    for context in (64, 128):
        (delta_net, *_, full) = kv_cache(model, context)["attention"]
        assert delta_net.group == 2 * 8 * 8 * 4 + 32 * 4 * 4
        assert full.group == 2 * 8 * 4 * context
        weights = 32 * 32 + 32 * 4 + 16 * 32 + 2 * 2 * 32 + 16 * 32
        assert flops(model, context)["attention"][0].element == 2 * weights + 6 * 2 * 8 * 8


def test_dense_forward_allocates_what_is_estimated() -> None:
    config = tiny_config("qwen3_5_text")
    sizes = {"vocab_size": 200, "hidden_size": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    for name, value in sizes.items():
        setattr(config, name, value)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    (tokens,) = random_batches(windows=4, length=64, batches=1)
    expected = layer_bytes(Sizes(PrunableModel.of(model), medium_recipe()), tokens.numel(), 64)
    with Allocations() as seen:
        summed_loss(model, tokens)
    assert seen.peak == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "sizes",
    [
        [(2, 9), (3, 24), (4, 24), (0, 5)],
        [(2, 9), (3, 24), (4, 24), (0, 0)],
        [(0, 0), (3, 24), (4, 24), (0, 0)],
        [(0, 9), (0, 24), (0, 7), (3, 24)],
        [(0, 9), (0, 24), (0, 7), (0, 24)],
    ],
    ids=["no full heads", "no full layer", "one more layer", "no DeltaNet", "no attention"],
)
def test_an_export_generates_with_a_cache_whatever_attention_is_left(tmp_path: Path, sizes) -> None:
    base = tiny_model("qwen3_5_text")
    save(base, tmp_path / "base")
    mask = draw(base, sizes)
    export(tmp_path / "base", tmp_path / "out", mask)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with Evaluator(PrunableModel.of(base)).shrunk(mask) as shrunk:
        torch.testing.assert_close(logits_of(model, random_tokens()), logits_of(shrunk, random_tokens()))
    texts = [model.generate(random_tokens(length=9), use_cache=use_cache, **GENERATE) for use_cache in (True, False)]
    assert torch.equal(*texts)


def test_blocks_of_one_kind_with_equal_sizes_make_a_stock_model(tmp_path: Path) -> None:
    base = tiny_model("qwen3_5_text")
    plan = export(save(base, tmp_path / "base"), tmp_path / "out", draw(base, EQUAL))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan.stock and config["model_type"] == "qwen3_5_text"
    assert (config["linear_num_key_heads"], config["linear_num_value_heads"]) == (2, 4)
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["intermediate_size"]) == (3, 3, 20)


def test_tensors_that_transformers_ignores_are_exported_byte_for_byte(tmp_path: Path) -> None:
    base = tiny_model("qwen3_5_text")
    path = save(base, tmp_path / "base") / "model.safetensors"
    ignored = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.randn(24, 32).bfloat16()}
    ignored["model.visual.patch_embed.proj.weight"] = torch.randn(16, 3, 2, 4, 4)
    save_file(load_file(path) | ignored, path, metadata={"format": "pt"})
    export(tmp_path / "base", tmp_path / "out", draw(base, UNEQUAL))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in ignored.items()
    )
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- a model of text and images


@pytest.fixture
def wrapped(tmp_path: Path) -> Path:
    """A tiny Qwen3.5 with a vision tower and a head that predicts two tokens at once (MTP), on disk."""
    from transformers.models.qwen3_5 import Qwen3_5VisionConfig

    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = tf.Qwen3_5Config(
        text_config=tiny_config("qwen3_5_text").to_dict(),
        vision_config=Qwen3_5VisionConfig(**sizes, patch_size=4, num_position_embeddings=16).to_dict(),
        **tokens,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() > 1 else 0.2)
    path = save(model.eval(), tmp_path / "base") / "model.safetensors"
    mtp = {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32).bfloat16()}
    save_file(load_file(path) | mtp, path, metadata={"format": "pt"})
    return tmp_path / "base"


def images(config: Any) -> dict[str, Tensor]:
    """Return one image of 4 tokens, and a text with its tokens."""
    tokens = torch.cat([torch.full((1, 4), config.image_token_id), random_tokens(length=8)[:1] % 80 + 10], 1)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "pixel_values": pixels, "attention_mask": torch.ones_like(tokens)}
    is_image = (tokens == config.image_token_id).long()
    return inputs | {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": is_image}


@torch.no_grad()
def whole_logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**(inputs or {"input_ids": random_tokens() % 80 + 10}), use_cache=False).logits


@pytest.mark.parametrize("weight_format", ["full", "int8"])
def test_the_decoder_is_loaded_alone(wrapped: Path, weight_format) -> None:
    expected = whole_logits(tf.AutoModelForImageTextToText.from_pretrained(wrapped))
    check_prunable(resolve(str(wrapped)), ["attention", "ffn"])
    model = load_prunable(resolve(str(wrapped)), "float32", "cpu", weight_format).module
    assert not any("visual" in name for name, _ in model.named_parameters())
    error = (whole_logits(model) - expected).abs().mean() / expected.abs().mean()
    assert error < (1e-6 if weight_format == "full" else 0.3)


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_vision_and_mtp_are_exported_as_they_are(wrapped: Path, tmp_path: Path, sizes) -> None:
    model = load_prunable(resolve(str(wrapped)), "float32", "cpu")
    mask = draw(model.module, sizes)
    with Evaluator(model).shrunk(mask) as shrunk:
        expected = whole_logits(shrunk)
    plan = export(wrapped, tmp_path / "out", mask)
    assert plan.stock == (sizes is EQUAL)
    before, after = (load_file(path / "model.safetensors") for path in (wrapped, tmp_path / "out"))
    others = {name for name in before if decoder_name(name) == name}
    assert {"mtp.fc.weight", "mtp.norm.weight"} < others == {name for name in after if decoder_name(name) == name}
    assert all(same_bytes(before[name], after[name]) for name in others)
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(whole_logits(loaded), expected, atol=1e-4, rtol=1e-4)
    again = load_prunable(resolve(str(tmp_path / "out")), "float32", "cpu")
    torch.testing.assert_close(whole_logits(again.module), expected, atol=1e-4, rtol=1e-4)
    inputs = images(loaded.config)
    seen = whole_logits(loaded, **inputs)
    assert seen.isfinite().all()
    assert not torch.allclose(seen, whole_logits(loaded, **inputs | {"pixel_values": 1 - inputs["pixel_values"]}))
    texts = [loaded.generate(**inputs, **GENERATE, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)
