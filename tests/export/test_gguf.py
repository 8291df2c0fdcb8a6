"""GGUF exports: their tensors compared with the masked dense weights, and llama.cpp's outputs with the model's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import llamacpp
from helpers.exports import DECISIONS, decide
from helpers.masks import KV_HEADS, LAYERS, draw, masked, random_repair, repaired_by_hand
from helpers.messages import refused
from helpers.models import TEXT, VOCABULARY, save_tokenizer, tiny_config, tiny_model

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.export import gguf as writer
from pgprune_cli.export.plan import Options
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.model.loading import load_model, load_tokenizer
from pgprune_cli.model.masks import LayerMask, RepairedBlock
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

ALIKE = [(2, 6)] * LAYERS
DIFFERING = ("llama-mha", "llama-gqa", "llama-biased", "mistral", "qwen2")


def saved(architecture: str, directory: Path, **changes):
    """Save a tiny model, with `changes` to its config, and a tokenizer in `directory`."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(architecture)
    if changes:
        weights = model.state_dict()
        config = tiny_config(architecture)
        for name, value in changes.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        model.load_state_dict(weights)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def export(
    base: Path, out: Path, model_mask, dtype=None, decision=None, measured=None, requirements=None
) -> writer.FilePlan:
    decision = decision or decide(base, model_mask)
    options = Options(requirements or ShapeRequirements(), dtype)
    planned = writer.plan(resolve(str(base)), decision, options, measured)
    planned.write(out, lambda count: None)
    return planned


@pytest.fixture
def multiples_of_8(monkeypatch):
    """Lower the multiple of FFN channels to 8, so that the 24 of the tiny models leave a choice."""
    requirements = ShapeRequirements("first", "every", pad_ffn=8)
    monkeypatch.setattr(writer, "requirements_of", lambda family, model_type: requirements)


def values(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a file, dequantised, by name."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)).view(
            *(int(n) for n in reversed(t.shape))
        )
        for t in tensors
    }


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of q or k in transformers' order: rows 0, 2, 4, … of a head in llama.cpp, then 1, 3, 5, …"""
    size = len(rows) // heads
    order = [head * size + row for head in range(heads) for row in (*range(0, size, 2), *range(1, size, 2))]
    return rows[order]


@pytest.mark.parametrize("refitted", [False, True], ids=["", "refitted"])
@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("architecture", DIFFERING)
def test_tensors_are_those_of_the_masked_dense_model(architecture, name, refitted, tmp_path, multiples_of_8):
    model = saved(architecture, tmp_path / "base")
    model_mask = draw(model, DECISIONS[name])
    repaired = random_repair(model, model_mask, bias=False) if refitted else {}
    decision = dataclasses.replace(decide(tmp_path / "base", model_mask), repaired=repaired)
    planned = export(tmp_path / "base", tmp_path / "out.gguf", model_mask, "float32", decision)
    model = repaired_by_hand(model, model_mask, repaired)
    tensors, meta = values(tmp_path / "out.gguf"), fields(tmp_path / "out.gguf")
    dense, config = model.state_dict(), model.config

    kept = [index for index, layer in enumerate(model_mask) if layer.attention.any() or layer.ffn.any()]
    heads = [int(planned.shapes.written[index].attention.sum()) for index in kept]
    kv_heads = [int(kv_mask(planned.shapes.written[index].attention).sum()) for index in kept]
    assert kv_heads[0] and kv_heads[1:] == [int(kv_mask(model_mask[index].attention).sum()) for index in kept[1:]]
    assert meta["general.architecture"] == "deci" == planned.model_type and not planned.stock
    assert meta["deci.block_count"] == len(kept) == len(planned.shapes.layers)
    assert meta["deci.attention.head_count_kv"] == kv_heads
    assert meta["deci.attention.head_count"] == heads
    assert meta["deci.feed_forward_length"] == [-(-max(int(model_mask[i].ffn.sum()), 1) // 8) * 8 for i in kept]

    expected = {
        "token_embd.weight": dense["model.embed_tokens.weight"],
        "output_norm.weight": dense["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        expected["output.weight"] = dense["lm_head.weight"]
    for number, index in enumerate(kept):
        expected |= layer_by_hand(dense, index, number, model_mask[index], planned.shapes.written[index], config)
    for number, counts in enumerate(zip(heads, kv_heads, strict=True)):
        for key, count in zip(("attn_q", "attn_k"), counts, strict=True):
            for kind in ("weight", "bias"):
                if (name := f"blk.{number}.{key}.{kind}") in tensors and count:
                    tensors[name] = halves(tensors[name], count)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def kv_mask(query_heads: torch.Tensor) -> torch.Tensor:
    """Return which KV heads have a query head in a mask of query heads."""
    return query_heads.view(KV_HEADS, -1).any(1)


def layer_by_hand(dense, index, number, kept: LayerMask, written: LayerMask, config) -> dict[str, torch.Tensor]:
    """Return the tensors that the file should have for one layer, with the rows of q and k in transformers' order.

    Padding has the rows of the base model, and zeros in the output columns.
    """
    base, size = f"model.layers.{index}", config.head_dim
    result = {}
    for block, norm, inputs, output, mask, used_mask in (
        ("self_attn", "input_layernorm", "qkv", "o", written.attention, kept.attention),
        ("mlp", "post_attention_layernorm", ("gate", "up"), "down", written.ffn, kept.ffn),
    ):
        if not mask.any():
            continue
        name, gguf_name = f"{base}.{block}", "attn" if block == "self_attn" else "ffn"
        result[f"{gguf_name}_norm.weight"] = dense[f"{base}.{norm}.weight"]
        width = size if block == "self_attn" else 1
        for key in inputs:
            rows = (kv_mask(mask) if key in ("k", "v") else mask).repeat_interleave(width)
            for kind in ("weight", "bias"):
                if (full := f"{name}.{key}_proj.{kind}") in dense:
                    result[f"{gguf_name}_{key}.{kind}"] = dense[full][rows]
        weight = dense[f"{name}.{output}_proj.weight"] * used_mask.repeat_interleave(width)
        written_output = f"{gguf_name}_{'output' if output == 'o' else output}"
        result[f"{written_output}.weight"] = weight[:, mask.repeat_interleave(width)]
        if (full := f"{name}.{output}_proj.bias") in dense:
            result[f"{written_output}.bias"] = dense[full] * used_mask.any()
    return {f"blk.{number}.{name}": tensor for name, tensor in result.items()}


def test_channels_are_padded_to_the_blocks_of_q8_0_and_to_the_users_multiple(tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config("llama-gqa")
    config.intermediate_size = 80
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model_mask = draw(model, [((1, 2), (1, 5)), ((3, 2), (1, 33)), (0, (1, 70)), ((4, 2), 0)])
    export(tmp_path / "base", tmp_path / "out.gguf", model_mask, "q8_0")
    meta = fields(tmp_path / "out.gguf")
    assert meta["deci.feed_forward_length"] == [32, 64, 80, 32]
    assert meta["deci.attention.head_count_kv"] == [1, 3, 0, 4]
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q8_0", "Q8_0", "F16", "Q8_0"]
    requirements = ShapeRequirements("every", pad_kv_heads=2, pad_ffn=48)
    planned = export(tmp_path / "base", tmp_path / "wide.gguf", model_mask, requirements=requirements)
    assert fields(tmp_path / "wide.gguf")["deci.feed_forward_length"] == [80] * 4
    expected = [((2, 2), 80), ((4, 2), 80), ((2, 2), 80), ((4, 2), 80)]
    assert planned.shapes.sizes() == [{"attention": heads, "ffn": (1, channels)} for heads, channels in expected]


def test_metadata_describes_the_model_and_its_origin(tmp_path):
    model = saved("mistral", tmp_path / "base")
    model_mask = draw(model, DECISIONS["mixed sizes"])
    measured = {"perplexity": [{"corpus": "wikitext2", "ppl": 12.5}]}
    out = tmp_path / "new" / "small.gguf"
    planned = export(tmp_path / "base", out, model_mask, measured=measured)
    meta = fields(out)
    assert meta["general.name"] == "base, pruned"
    assert meta["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert meta["deci.context_length"] == 16, "the length of the sliding window"
    assert meta["deci.attention.key_length"] == meta["deci.attention.value_length"] == 8
    assert meta["deci.rope.dimension_count"] == 8
    assert meta["deci.rope.freq_base"] == 10000.0
    assert meta["deci.embedding_length"] == 32
    assert meta["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert meta["pgprune.recipe"] == "dtype: float32"
    assert meta["pgprune.kept.query_heads"] == [8, 3, 2, 4]
    assert json.loads(meta["pgprune.evaluation"]) == measured
    assert planned.bytes == out.stat().st_size
    assert planned.parameters_after < planned.parameters_before
    assert [path.name for path in out.parent.iterdir()] == ["small.gguf"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_matrices_have_the_requested_dtype_and_vectors_float32(dtype, tmp_path):
    """A matrix whose rows the blocks of q8_0 do not divide is float16."""
    model = saved("llama-biased", tmp_path / "base")
    model_mask = draw(model, DECISIONS["mixed sizes"])
    export(tmp_path / "base", tmp_path / "exact.gguf", model_mask, "float32")
    export(tmp_path / "base", tmp_path / "out.gguf", model_mask, dtype)
    requested = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    exact, stored = values(tmp_path / "exact.gguf"), values(tmp_path / "out.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        rows = int(tensor.shape[0])
        kind = "F32" if len(tensor.shape) == 1 else "F16" if dtype == "q8_0" and rows % 32 else requested
        assert tensor.tensor_type.name == kind, tensor.name
        width = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}[kind]
        error = (stored[tensor.name] - exact[tensor.name]).abs().max()
        assert error <= 1.01 * width * exact[tensor.name].abs().max(), tensor.name
        assert kind == "F32" or error > 0 or not exact[tensor.name].any()
    assert fields(tmp_path / "out.gguf")["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{requested}"]


def test_the_default_dtype_is_that_of_the_base_model(tmp_path):
    model = saved("llama-gqa", tmp_path / "base")
    tiny_model("llama-gqa").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "out.gguf", draw(model, ALIKE))
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if len(t.shape) > 1}
    assert kinds == {"BF16"}


def test_values_beyond_float16_are_refused_and_leave_nothing_behind(tmp_path):
    model = saved("llama-gqa", tmp_path / "base")
    model.model.layers[3].mlp.up_proj.weight[:] = 1e5
    model.save_pretrained(tmp_path / "base")
    with refused("blk.3.ffn_up.weight: ", "1e+05", "float16", "6.55e+04"):
        export(tmp_path / "base", tmp_path / "out.gguf", draw(model, ALIKE), "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("architecture", "stock"), [("llama-biased", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_layers_of_equal_sizes_make_a_stock_file(architecture, stock, tmp_path):
    model = saved(architecture, tmp_path / "base")
    planned = export(tmp_path / "base", tmp_path / "out.gguf", draw(model, ALIKE))
    meta = fields(tmp_path / "out.gguf")
    assert (meta["general.architecture"], planned.stock) == (stock, True)
    assert meta[f"{stock}.attention.head_count"] == 4
    assert meta[f"{stock}.feed_forward_length"] == 24


def test_a_gguf_base_model_gives_the_same_file(tmp_path):
    """transformers reads a stock file as the model that was exported."""
    model = saved("llama-mha", tmp_path / "base")
    export(tmp_path / "base", tmp_path / "dense.gguf", draw(model, [(4, 24)] * LAYERS))
    tokens = torch.randint(VOCABULARY, (2, 20))
    read = load_model(resolve(str(tmp_path / "dense.gguf")), "float32", "cpu")
    torch.testing.assert_close(read(tokens).logits, model(tokens).logits)

    model_mask = draw(model, DECISIONS["no heads in the first layer"])
    export(tmp_path / "base", tmp_path / "direct.gguf", model_mask)
    export(tmp_path / "dense.gguf", tmp_path / "again.gguf", model_mask)
    direct, again = values(tmp_path / "direct.gguf"), values(tmp_path / "again.gguf")
    assert direct.keys() == again.keys() and all(torch.equal(direct[name], again[name]) for name in direct)
    direct, again = fields(tmp_path / "direct.gguf"), fields(tmp_path / "again.gguf")
    assert {k: v for k, v in direct.items() if "tokenizer" in k} == {k: v for k, v in again.items() if "tokenizer" in k}


def test_a_sharded_base_model_gives_the_same_tensors(tmp_path):
    model = saved("llama-biased", tmp_path / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    save_tokenizer(tmp_path / "sharded")
    model_mask = draw(model, DECISIONS["two layers removed, among them the first"])
    export(tmp_path / "base", tmp_path / "one.gguf", model_mask)
    written_bytes: list[int] = []
    planned = writer.plan(resolve(str(tmp_path / "sharded")), decide(tmp_path / "sharded", model_mask), Options())
    assert len(planned.base.shards) > 1
    planned.write(tmp_path / "many.gguf", written_bytes.append)
    one, many = values(tmp_path / "one.gguf"), values(tmp_path / "many.gguf")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert written_bytes == [planned.stored(edit)[1] for edit in planned.edits]


def test_the_tokenizer_and_its_chat_template_are_converted(tmp_path):
    model = saved("llama-gqa", tmp_path / "base", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "base", VOCABULARY - 3, chat_template="{{ messages[0].content }}")
    export(tmp_path / "base", tmp_path / "out.gguf", draw(model, ALIKE))
    meta, tokenizer = fields(tmp_path / "out.gguf"), load_tokenizer(resolve(str(tmp_path / "base")))
    tokens = [*tokenizer.convert_ids_to_tokens(range(VOCABULARY - 3)), "[PAD93]", "[PAD94]", "[PAD95]"]
    assert meta["tokenizer.ggml.model"] == "gpt2" and meta["tokenizer.ggml.pre"] == "gpt-2"
    assert meta["tokenizer.ggml.tokens"] == tokens
    assert meta["tokenizer.ggml.token_type"] == [3] * 3 + [1] * (VOCABULARY - 6) + [5] * 3
    assert [meta[f"tokenizer.ggml.{kind}_token_id"] for kind in ("padding", "bos", "eos")] == [0, 1, 2]
    assert not meta["tokenizer.ggml.add_bos_token"]
    assert meta["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_added_tokens_without_an_embedding_are_left_out(tmp_path):
    """Such as <image_soft_token> of the Gemma 3 that see no images."""
    model = saved("llama-gqa", tmp_path / "base")
    tokenizer = load_tokenizer(resolve(str(tmp_path / "base")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    planned = export(tmp_path / "base", tmp_path / "out.gguf", draw(model, ALIKE))
    meta = fields(tmp_path / "out.gguf")
    assert len(meta["tokenizer.ggml.tokens"]) == VOCABULARY and meta["tokenizer.ggml.tokens"][-1] == "ab"
    assert "tokenizer.ggml.padding_token_id" not in meta
    [note] = planned.notes
    assert "2 tokens" in note and "[PAD]" in note


UNEQUAL = DECISIONS["mixed sizes"]


@pytest.mark.parametrize(
    ("architecture", "counts", "changes", "facts"),
    [
        ("qwen3", UNEQUAL, {"tie_word_embeddings": False}, ("openelm", "output matrix", "budget.scope: per-layer")),
        ("llama-gqa", UNEQUAL, {"hidden_act": "gelu"}, ("deci", "silu", "gelu")),
        (
            "llama-gqa",
            UNEQUAL,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ("deci", "rope_parameters of type dynamic"),
        ),
        (
            "qwen3",
            ALIKE,
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            ("qwen3", "openelm", "rope_parameters of type linear"),
        ),
        ("llama-gqa", [(0, 0)] * LAYERS, {}, ("keeps no units",)),
    ],
    ids=["untied-qwen3-unequal", "gelu", "dynamic-rope", "qwen3-linear-rope", "nothing-kept"],
)
def test_a_model_that_gguf_cannot_hold_is_refused_before_writing(architecture, counts, changes, facts, tmp_path):
    model = saved(architecture, tmp_path / "base", **changes)
    with refused(*facts):
        export(tmp_path / "base", tmp_path / "new" / "out.gguf", draw(model, counts))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_qwen3_with_fitted_biases_is_refused(tmp_path):
    model = saved("qwen3", tmp_path / "base")
    decision = dataclasses.replace(
        decide(tmp_path / "base", draw(model, ALIKE)),
        repaired={(1, "ffn"): RepairedBlock(torch.zeros(32, 6), torch.zeros(32))},
    )
    with refused("qwen3", "output biases", "--format hf"):
        export(tmp_path / "base", tmp_path / "out.gguf", draw(model, ALIKE), decision=decision)


def unsupported_tokenizers():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    yield Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), ("WordLevel", "BPE")
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    yield tokenizer, ("splits text", "Punctuation")
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.ByteLevel(), normalizers.Lowercase()
    yield tokenizer, ("Lowercase",)
    tokenizer = Tokenizer(models.BPE({"a": VOCABULARY}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    yield tokenizer, ("the token 96", "96 embeddings")


def test_a_tokenizer_that_llama_cpp_does_not_support_is_refused_before_writing(tmp_path):
    from transformers import PreTrainedTokenizerFast

    base = tmp_path / "base"
    model = saved("llama-gqa", base)
    for tokenizer, facts in unsupported_tokenizers():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
        with refused(str(base), *facts):
            export(base, tmp_path / "new" / "out.gguf", draw(model, UNEQUAL))
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_existing_files_other_models_and_full_disks_are_refused(tmp_path, monkeypatch):
    model = saved("llama-gqa", tmp_path / "base")
    model_mask = draw(model, ALIKE)
    (tmp_path / "there.gguf").touch()
    with refused(f"{tmp_path / 'there.gguf'}: already exists"):
        export(tmp_path / "base", tmp_path / "there.gguf", model_mask)
    decision = decide(tmp_path / "base", model_mask)
    tiny_model("llama-gqa", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="not the model that was searched"):
        export(tmp_path / "base", tmp_path / "out.gguf", model_mask, decision=decision)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(RunError, match=r"needs about \d+ MB of disk, but only 0 MB are free\."):
        export(tmp_path / "base", tmp_path / "new" / "out.gguf", model_mask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "there.gguf"]


# --- llama.cpp's outputs


ENDS = [0, 2]
"""Tokens that end a text: <|endoftext|> and </s>."""


def compare(models: list[Path], references: list, prompt: list[int], tolerance: float = 2e-4) -> None:
    """Compare llama.cpp's greedy tokens and log-probabilities, made with a cache, with passes of the references."""
    for path, (ids, log_probabilities), reference in zip(
        models, llamacpp.generate(models, prompt, 12, VOCABULARY), references, strict=True
    ):
        sequence = torch.tensor([prompt + ids])
        with torch.inference_mode(), reference() as model:
            logits = model(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert (log_probabilities - logits.log_softmax(-1)).abs().max() < tolerance, path
        # tokens that end the text keep their probability, but are never chosen
        assert ids == logits.index_fill(1, torch.tensor(ENDS), -torch.inf).argmax(-1).tolist(), path


def prompt() -> list[int]:
    return torch.randint(3, VOCABULARY, (9,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("architecture", [*DIFFERING, "qwen3"])
def test_llama_cpp_has_the_outputs_of_the_masked_dense_model(architecture, tmp_path):
    llamacpp.require()
    # texts longer than the Mistral's window of 16 are not supported in the file
    changes = {"sliding_window": 128} if architecture == "mistral" else {}
    model = saved(architecture, tmp_path / "base", **changes)
    decisions = {"alike": ALIKE} | DECISIONS
    models, references = [], []
    for number, counts in enumerate(decisions.values()):
        model_mask = draw(model, counts)
        models.append(tmp_path / f"{number}.gguf")
        export(tmp_path / "base", models[-1], model_mask)
        references.append(lambda model_mask=model_mask: masked(model, model_mask))
    compare(models, references, prompt())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_llama_cpp_scales_rope_as_transformers_does(rope, tmp_path):
    llamacpp.require()
    original = {} if rope["rope_type"] == "linear" else {"original_max_position_embeddings": 8}
    parameters = {"rope_theta": 100.0, **rope, **original}
    model = saved("llama-gqa", tmp_path / "base", rope_parameters=parameters)
    plain = tiny_model("llama-gqa")
    tokens = torch.tensor([prompt()])
    assert not torch.allclose(model(tokens).logits, plain(tokens).logits, atol=1e-2), "the scaling matters"
    model_mask = draw(model, DECISIONS["no heads in the first layer"])
    export(tmp_path / "base", tmp_path / "out.gguf", model_mask)
    compare([tmp_path / "out.gguf"], [lambda: masked(model, model_mask)], prompt())


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen2"])
def test_llama_cpp_adds_the_biases_fitted_by_a_repair(architecture, tmp_path):
    """A Qwen2 with equal layers becomes a `deci` file, because `qwen2` has no place for these biases."""
    llamacpp.require()
    from contextlib import contextmanager

    model = saved(architecture, tmp_path / "base")
    models, references = [], []
    for number, counts in enumerate((DECISIONS["two layers without heads, two without channels"], ALIKE)):
        model_mask, repaired, repairs = draw(model, counts), {}, []
        generator = torch.Generator().manual_seed(number)
        for index, layer in enumerate(model_mask):
            for block, linear in (
                ("attention", model.model.layers[index].self_attn.o_proj),
                ("ffn", model.model.layers[index].mlp.down_proj),
            ):
                mask = layer.of(block)
                columns = mask.repeat_interleave(linear.in_features // len(mask))
                if mask.any():
                    weight = torch.randn(32, int(columns.sum()), generator=generator) * 0.3
                    repaired[index, block] = RepairedBlock(weight, torch.randn(32, generator=generator))
                    repairs.append((linear, columns, repaired[index, block]))
        base = tmp_path / "base"
        decision = Decision(
            model_mask, str(base), resolve(str(base)).fingerprint(), 0.5, "dtype: float32", 1, 2, 3, 2.5, repaired
        )
        models.append(tmp_path / f"{number}.gguf")
        export(base, models[-1], model_mask, decision=decision)

        @contextmanager
        def repaired(model_mask=model_mask, repairs=repairs):
            before = [linear.weight.clone() for linear, _, _ in repairs]
            handles = []
            for linear, columns, output in repairs:
                linear.weight[:, columns] = output.weight
                handles.append(linear.register_forward_hook(lambda _, __, y, bias=output.bias: y + bias))
            with masked(model, model_mask):
                yield model
            for (linear, _, _), weight in zip(repairs, before, strict=True):
                linear.weight[:] = weight
            for handle in handles:
                handle.remove()

        references.append(repaired)
    assert "blk.0.ffn_down.bias" in values(models[0])
    assert fields(models[1])["general.architecture"] == {"llama-gqa": "llama", "qwen2": "deci"}[architecture]
    compare(models, references, prompt())


def splitters():
    """Yield the supported ways to split text, by llama.cpp's names."""
    from tokenizers import Regex, pre_tokenizers

    from pgprune_cli.export.gguf_tokenizer import SPLITS

    splitting = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    yield "gpt-2", splitting
    yield "smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splitting])
    for pattern, name in SPLITS.items():
        yield name, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def test_the_splitter_of_phi_4_mini_and_gpt_oss_is_written():
    from pgprune_cli.export.gguf_tokenizer import SPLITS

    pattern = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert SPLITS[pattern] == "gpt-4o"


def test_llama_cpp_tokenizes_text_as_transformers_does(tmp_path):
    """Compares the next-token probabilities, which another tokenization would change."""
    llamacpp.require()
    check_text(tmp_path, {name: (lambda path, s=s: save_tokenizer(path, 400, s)) for name, s in splitters()})


def test_llama_cpp_tokenizes_text_as_a_sentencepiece_tokenizer_does(tmp_path):
    llamacpp.require()

    def save(directory: Path) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", "<s>", "</s>"]
        trainer = trainers.BpeTrainer(
            vocab_size=380, special_tokens=special + [f"<0x{n:02X}>" for n in range(256)], show_progress=False
        )
        words = TEXT.replace("日本語", "").replace(" ", "▁ ").split(" ")
        tokenizer.train_from_iterator(words * 4, trainer)
        state = json.loads(tokenizer.to_str())
        # transformers converts SentencePiece like this: every pair that makes a piece, the better piece first
        vocabulary = state["model"]["vocab"]
        pieces = sorted((piece for piece in vocabulary if piece[0] != "<"), key=vocabulary.get)
        state["model"]["merges"] = [
            [piece[:cut], piece[cut:]]
            for piece in pieces
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        fast.save_pretrained(directory)

    check_text(tmp_path, {"sentencepiece": save})


def check_text(tmp_path: Path, savers: dict) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**tiny_config("llama-gqa").to_dict() | {"vocab_size": 400})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    models, references, forced = [], [], []
    for name, save in savers.items():
        base = tmp_path / name
        model.save_pretrained(base)
        save(base)
        models.append(tmp_path / f"{name}.gguf")
        export(base, models[-1], draw(model, ALIKE))
        tokenizer = load_tokenizer(resolve(str(base)))
        ids = tokenizer(TEXT).input_ids
        forced.append(tokenizer.convert_tokens_to_ids("a"))
        with torch.inference_mode(), masked(model, draw(model, ALIKE)):
            references.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
    assert len(set(forced)) == 1
    results = llamacpp.generate(models, TEXT, 1, 400, forced[0])
    for name, (_, log_probabilities), reference in zip(savers, results, references, strict=True):
        assert (log_probabilities[0] - reference).abs().max() < 2e-4, name
