"""A tokenizer gives the same token ids in an export, whatever its kind, its declared class and the model type."""

from __future__ import annotations

import json

import pytest
from helpers.exports import decide
from helpers.masks import draw
from helpers.messages import refused, says
from helpers.models import save_tokenizer, tiny_config
from helpers.tokenizer_kinds import BY_WORD, MODEL_TYPES, bases, by_regex, export_tokenizer, save_base
from transformers import AutoModelForCausalLM

from pgprune_cli.export import gguf
from pgprune_cli.export.plan import Options
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.model.tokenizer_files import faults_of_tokenizer, write_tokenizer

STEP = 53
"""Of about 5,000 combinations, every 53rd is tried here, and every 13th by make test-transformers."""
QWEN2 = BY_WORD.removesuffix(r"\s+") + r"\s+(?!\S)|\s+"
DECOMPOSED = "cafe\u0301"
TEXT = "<s>[INST] the dog  didn't<image> see 12345 <|im_start|>things"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_export_has_the_token_ids_of_its_base_under_every_model_type(model_type, tmp_path):
    for source, _ in bases(tmp_path, STEP, model_type):
        base = load_tokenizer(source)
        for exported in MODEL_TYPES[model_type]:
            out = source.directory / exported
            export_tokenizer(source, out, exported)
            tokenizer = load_tokenizer(Source("export", out, None))
            assert tokenizer(TEXT)["input_ids"] == base(TEXT)["input_ids"], (source, exported)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_input_names"):
                assert getattr(tokenizer, name) == getattr(base, name), (source, exported, name)
            assert tokenizer.padding_side == base.padding_side and tokenizer.chat_template == base.chat_template
            assert set(base.all_special_tokens) <= set(tokenizer.all_special_tokens)
            assert tokenizer.decode(base(TEXT)["input_ids"]) == base.decode(base(TEXT)["input_ids"])


@pytest.mark.parametrize(("model_type", "kind", "declared", "exported"), [
    ("mistral", "sentencepiece, legacy", "LlamaTokenizer", "pruned_mistral"),
    ("llama", "sentencepiece, legacy", "LlamaTokenizer", "mistral"),
    ("qwen2", "three digits", "PreTrainedTokenizerFast", "pruned_qwen2"),
])  # fmt: skip
def test_copied_files_would_give_other_ids(model_type, kind, declared, exported, tmp_path):
    """These are the reasons for writing a tokenizer anew. If transformers no longer needs it, copying is simpler."""
    source = save_base(tmp_path / "base", model_type, kind, True, declared, "not legacy")
    expected = load_tokenizer(source)(TEXT)["input_ids"]
    (source.directory / "config.json").write_text(json.dumps({"model_type": exported}))
    assert load_tokenizer(source)(TEXT)["input_ids"] != expected


def test_the_written_files_name_the_class_that_every_transformers_has(tmp_path):
    source = save_base(tmp_path / "base", "llama", "sentencepiece", True, "TokenizersBackend", "plain")
    path = source.directory / "tokenizer_config.json"
    keys = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["x.X", None]}, "backend": "tokenizers"}
    keys["extra_special_tokens"] = keys.pop("additional_special_tokens")  # transformers 4 stops at a list of that name
    path.write_text(json.dumps(keys))
    export_tokenizer(source, tmp_path / "out", "pruned_llama")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["additional_special_tokens"] == ["<image>", "<|im_start|>"]
    assert not {"auto_map", "backend", "extra_special_tokens"} & set(config)


def test_other_ids_are_refused_at_the_export_and_found_by_verify(tmp_path):
    source = save_base(tmp_path / "base", "qwen3", "three digits", True, "PreTrainedTokenizerFast", "plain")
    # transformers puts Qwen2's pre-tokenizer into every tokenizer of a stock Qwen2.
    with refused(str(source.directory), "12345", "model type qwen2", "budget.scope: global"):
        export_tokenizer(source, tmp_path / "out", "qwen2")
    export_tokenizer(source, tmp_path / "good", "qwen3")
    assert not faults_of_tokenizer(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (fault,) = faults_of_tokenizer(tmp_path / "good")
    says(fault, str(tmp_path / "good"), "12345", "20, 21, 22 in place of 277, 268")


def test_the_tokenizer_of_a_gguf_file_has_the_ids_that_it_has_in_an_export(tmp_path):
    """transformers normalises text for a stock Qwen2, but not for the tokenizer of a Qwen2's GGUF file."""
    gguf_library = pytest.importorskip("gguf")
    config = tiny_config("qwen2")
    config.vocab_size = 300
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 300, by_regex(QWEN2))
    decision = decide(tmp_path / "base", draw(model, [(4, 24)] * 4))
    gguf.plan(resolve(decision.model), decision, Options()).write(tmp_path / "model.gguf", lambda _: None)
    assert gguf_library.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == "qwen2"
    source = resolve(str(tmp_path / "model.gguf"))
    expected = load_tokenizer(source)(DECOMPOSED)["input_ids"]
    for model_type in ("qwen2", "pruned_qwen2"):
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
        write_tokenizer(source, tmp_path / model_type)
        assert load_tokenizer(Source("", tmp_path / model_type, None))(DECOMPOSED)["input_ids"] == expected
    assert load_tokenizer(resolve(decision.model))(DECOMPOSED)["input_ids"] == expected


def test_a_base_without_a_tokenizer_gets_none(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    source = Source("base", tmp_path / "base", None)
    write_tokenizer(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
