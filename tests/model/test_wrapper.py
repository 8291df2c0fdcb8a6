"""Models of text and images: the decoder is pruned, everything else is exported as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_config
from helpers.recoveries import recover
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pgprune_cli.export import gguf, hf
from pgprune_cli.export.plan import Options
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.export.trained import plan_again
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.recover import recover as recover_job
from pgprune_cli.jobs.recovery_request import Request
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.families.wrapper import decoder_name
from pgprune_cli.model.loading import check_prunable, load_prunable
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.run.decision import Decision

TOKENS = torch.randint(6, 96, (2, 20), generator=torch.Generator().manual_seed(0))
SIZES = {
    "equal": [(4, 2, 7)] * 4,
    "unequal": [(4, 2, 24), (3, 1, 7), (0, 0, 24), (0, 0, 0)],
}
"""How many KV heads, query heads per KV head and channels each layer keeps."""


def wrapper_config(kind: str) -> Any:
    """Return a config of one vision layer around a tiny decoder. kind: of the decoder."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "gemma3_text":
        vision = tf.SiglipVisionConfig(**small, image_size=16, patch_size=4)
        tokens = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 3, "eoi_token_index": 4}
        return tf.Gemma3Config(text_config=tiny_config(kind), vision_config=vision, **tokens)
    vision = tf.PixtralVisionConfig(**small, head_dim=8, image_size=16, patch_size=4)
    options = {"tie_word_embeddings": False, "spatial_merge_size": 2, "image_token_index": 5}
    return tf.Mistral3Config(text_config=tiny_config(kind), vision_config=vision, **options)


def mask_of(sizes: list[tuple[int, int, int]]) -> ModelMask:
    masks = []
    for groups, members, channels in sizes:
        heads = torch.zeros(4, 2, dtype=torch.bool)
        heads[4 - groups :, :members] = True
        masks.append(LayerMask(heads.flatten(), torch.arange(24) < channels))
    return tuple(masks)


def images(config: Any) -> dict[str, Tensor]:
    """Return one image, and a text with its tokens."""
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.full((1, 4), config.image_token_id), TOKENS[:1, :8]], 1)
    inputs = {"input_ids": tokens, "pixel_values": pixels, "attention_mask": torch.ones_like(tokens)}
    if config.get_text_config().model_type.endswith("gemma3_text"):
        return inputs | {"token_type_ids": (tokens == config.image_token_id).long()}
    return inputs | {"image_sizes": torch.tensor([[16, 16]])}


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**(inputs or {"input_ids": TOKENS}), use_cache=False).logits


@pytest.fixture(params=["mistral", "ministral3", "gemma3_text"])
def wrapped(request, tmp_path: Path) -> Path:
    """A tiny model of text and images on disk."""
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(wrapper_config(request.param), dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3 if parameter.dim() > 1 else 0.2)
    model.eval().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    return tmp_path / "base"


def export(base: Path, out: Path, sizes: str, **options: Any) -> hf.DirectoryPlan:
    source, mask = resolve(str(base)), mask_of(SIZES[sizes])
    decision = Decision(mask, str(base), source.fingerprint(), 0.5, "dtype: float32", 10, 80, 9, 2.5)
    plan = hf.plan(source, decision, Options(**options))
    plan.write(out, lambda _: None)
    return plan


@pytest.mark.parametrize("weight_format", ["full", "int8"])
def test_the_decoder_is_loaded_alone_and_computes_what_it_does_in_the_wrapper(wrapped: Path, weight_format) -> None:
    whole = tf.AutoModelForImageTextToText.from_pretrained(wrapped)
    check_prunable(resolve(str(wrapped)), ["attention", "ffn"])
    model = load_prunable(resolve(str(wrapped)), "float32", "cpu", weight_format)
    assert not any("vision" in name for name, _ in model.module.named_parameters())
    expected = logits(whole)
    error = (logits(model.module) - expected).abs().mean() / expected.abs().mean()
    assert error < (1e-6 if weight_format == "full" else 0.1)


@pytest.mark.parametrize("sizes", SIZES)
def test_an_export_is_the_shrunk_model_and_its_vision_is_untouched(wrapped: Path, tmp_path: Path, sizes: str) -> None:
    model = load_prunable(resolve(str(wrapped)), "float32", "cpu")
    with Evaluator(model).shrunk(mask_of(SIZES[sizes])) as shrunk:
        expected = logits(shrunk)
    plan = export(wrapped, tmp_path / "out", sizes)
    assert plan.stock == (sizes == "equal") and plan.model_type.endswith(("mistral3", "gemma3"))
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    again = load_prunable(resolve(str(tmp_path / "out")), "float32", "cpu")
    torch.testing.assert_close(logits(again.module), expected, atol=1e-4, rtol=1e-4)
    before, after = (load_file(path / "model.safetensors") for path in (wrapped, tmp_path / "out"))
    others = {name for name in before if decoder_name(name) == name}
    assert others == {name for name in after if decoder_name(name) == name}
    assert len(others) > 10 and all(torch.equal(before[name], after[name]) for name in others)
    old, new = (json.loads((path / "config.json").read_text()) for path in (wrapped, tmp_path / "out"))
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    assert old["vision_config"] == new["vision_config"] and (tmp_path / "out" / "preprocessor_config.json").exists()


def test_a_trained_export_keeps_its_vision(wrapped: Path, tmp_path: Path) -> None:
    export(wrapped, tmp_path / "pruned", "unequal")
    model = recover(tmp_path / "pruned", tmp_path / "out")
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "out"))
    others = {name for name in before if decoder_name(name) == name}
    assert before.keys() == after.keys() and len(others) > 10
    assert all(torch.equal(before[name], after[name]) == (name in others) for name in before)
    plan = plan_again(tmp_path / "out", Options(ShapeRequirements("every", "every")))  # padded where blocks are missing
    assert plan.shapes.padded
    plan.write(tmp_path / "padded", lambda _: None)
    padded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(padded), logits(model), atol=1e-5, rtol=1e-5)


def test_an_unequal_export_sees_images_and_generates_with_a_cache(wrapped: Path, tmp_path: Path) -> None:
    export(wrapped, tmp_path / "out", "unequal")
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    inputs = images(model.config)
    seen = logits(model, **inputs)
    assert seen.isfinite().all()
    assert not torch.allclose(seen, logits(model, **inputs | {"pixel_values": 1 - inputs["pixel_values"]}))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


def test_files_with_the_names_of_the_modules_are_read_too(wrapped: Path, tmp_path: Path) -> None:
    """Newer files have the names of the modules: model.language_model and lm_head."""
    expected = logits(load_prunable(resolve(str(wrapped)), "float32", "cpu").module)
    path = wrapped / "model.safetensors"
    modules = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    renamed = {}
    for name, tensor in load_file(path).items():
        old = next((prefix for prefix in modules if name.startswith(prefix)), "")
        renamed[modules.get(old, "model.") + name.removeprefix(old)] = tensor
    save_file(renamed, path, metadata={"format": "pt"})
    for weight_format in ("full", "int8"):
        model = load_prunable(resolve(str(wrapped)), "float32", "cpu", weight_format)
        if weight_format == "full":
            assert torch.equal(logits(model.module), expected)
    export(wrapped, tmp_path / "out", "equal")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() <= renamed.keys()


def tensors_with_tied_head(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a file. Skip the test if one of them is the head."""
    tensors = load_file(path)
    if "language_model.lm_head.weight" in tensors:
        pytest.skip("its head is not tied")
    return tensors


def test_files_of_the_model_without_its_head_are_read_too(wrapped: Path, tmp_path: Path) -> None:
    """Saved without the head, a wrapper's decoder is `language_model` alone. The head is tied to its embedding."""
    path = wrapped / "model.safetensors"
    tensors = tensors_with_tied_head(path)
    expected = logits(load_prunable(resolve(str(wrapped)), "float32", "cpu").module)
    renamed = {name.replace("language_model.model.", "language_model.", 1): tensors[name] for name in tensors}
    save_file(renamed, path, metadata={"format": "pt"})
    check_prunable(resolve(str(wrapped)))
    assert torch.equal(logits(load_prunable(resolve(str(wrapped)), "float32", "cpu").module), expected)
    load_prunable(resolve(str(wrapped)), "float32", "cpu", "int8")
    export(wrapped, tmp_path / "out", "equal")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == renamed.keys()
    again = load_prunable(resolve(str(tmp_path / "out")), "float32", "cpu")
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(again.module), atol=1e-4, rtol=1e-4)


def test_a_head_that_is_stored_for_both_tied_weights_is_exported(wrapped: Path, tmp_path: Path) -> None:
    path = wrapped / "model.safetensors"
    tensors = tensors_with_tied_head(path)
    expected = logits(load_prunable(resolve(str(wrapped)), "float32", "cpu").module)
    names = set(tensors)
    tensors["language_model.lm_head.weight"] = tensors.pop("language_model.model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    assert torch.equal(logits(load_prunable(resolve(str(wrapped)), "float32", "cpu").module), expected)
    export(wrapped, tmp_path / "out", "equal")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names


@pytest.mark.parametrize("requested", [None, "float16"])
def test_an_export_has_the_dtype_that_only_the_whole_model_names(wrapped: Path, tmp_path: Path, requested) -> None:
    """Such as google/gemma-3-4b-it, whose config.json has no dtype in its text_config."""
    path = wrapped / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    path.write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(wrapped / "model.safetensors").items()}
    save_file(tensors, wrapped / "model.safetensors", metadata={"format": "pt"})
    export(wrapped, tmp_path / "out", "unequal", dtype=requested)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == (requested or "bfloat16") and "torch_dtype" not in config
    loaded = load_prunable(resolve(str(tmp_path / "out")), "auto", "cpu")
    assert loaded.module.dtype == getattr(torch, config["dtype"])


def test_a_config_does_not_tie_a_head_that_differs_from_the_embedding(wrapped: Path, tmp_path: Path) -> None:
    tensors = tensors_with_tied_head(wrapped / "model.safetensors")
    head = tensors["language_model.model.embed_tokens.weight"].flip(0)
    tensors["language_model.lm_head.weight"] = head
    save_file(tensors, wrapped / "model.safetensors", metadata={"format": "pt"})
    export(wrapped, tmp_path / "out", "unequal")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["tie_word_embeddings"] and not config["text_config"]["tie_word_embeddings"]
    loaded = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, head)


def test_a_gguf_file_holds_the_decoder_alone(wrapped: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source, mask = resolve(str(wrapped)), mask_of([(4, 2, 24)] * 4)
    decision = Decision(mask, str(wrapped), source.fingerprint(), 0.5, "dtype: float32", 10, 80, 9, 2.5)
    plan = gguf.plan(source, decision, Options())
    known = {"token_embd", "blk", "output_norm", "output", "rope_freqs"}
    assert {edit.name.split(".")[0] for edit in plan.edits} <= known
    assert any("vision" in note for note in plan.notes)


def test_a_wrapper_around_another_decoder_is_refused(wrapped: Path) -> None:
    path = wrapped / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] != "mistral3":
        pytest.skip("only mistral3 has decoders of several types")
    config["text_config"] = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 4}
    path.write_text(json.dumps(config))
    with refused("'gpt2' is not supported", "mistral3"):
        check_prunable(resolve(str(wrapped)))


@pytest.mark.parametrize("wrapped", ["ministral3", "gemma3_text"], indirect=True)
def test_decoder_is_recovered_and_the_vision_tower_stays_as_it_was(wrapped: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")
    export(wrapped, tmp_path / "small", "unequal")
    (tmp_path / "text.txt").write_text("The king was glad, and the queen was not. " * 60)
    settings = {"tokens": 1024, "seqlen": 16, "heldout": 4, "learning_rate": 0.01, "hidden": 0.1}
    settings |= {"corpus": tmp_path / "text.txt"}
    recipe = load(find("demo"), ["device=cpu", *(f"recover.{key}={value}" for key, value in settings.items())])
    record = recover_job(Request(str(tmp_path / "small"), tmp_path / "better", tmp_path / "run", recipe))
    assert record["loss_after"] < record["loss_before"]
    assert not verify(tmp_path / "better").faults
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "better"))
    assert before.keys() == after.keys()
    kept = {name for name in before if before[name].equal(after[name])}
    untrained = ("vision", "projector", "embed_tokens", "lm_head")
    assert kept == {name for name in before if any(part in name for part in untrained) or not before[name].numel()}
