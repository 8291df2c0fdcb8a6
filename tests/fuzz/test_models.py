"""Model directories with one thing wrong, given to everything that reads models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.inputs import JSON_VALUES, altered_json, damaged, examples, tried, with_altered_header, write
from helpers.masks import keep_first
from helpers.models import ARCHITECTURES, TEXT, save_tokenizer, tiny_config, tiny_model
from helpers.readers import Changed, read_everything
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from pgprune_cli.model.source import INDEX


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of every family with their tokenizers, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        tiny_model(architecture).save_pretrained(folder / architecture)
        save_tokenizer(folder / architecture)
    write(folder / "text.txt", TEXT.encode() * 9)
    return folder


MODELS = st.sampled_from(ARCHITECTURES)
CONFIG_KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
]
CONFIG_KEYS += ["num_hidden_layers", "max_position_embeddings", "sliding_window", "rms_norm_eps", "tie_word_embeddings"]
CONFIG_KEYS += ["hidden_act", "model_type", "rope_parameters", "layer_types", "attention_bias", "dtype", "torch_dtype"]
CONFIG_KEYS += ["quantization_config", "pad_token_id", "initializer_range", "attention_dropout", "architectures"]
CONFIG_KEYS += ["transformers_version", "per_layer_config"]
CONFIG_TEXTS = st.sampled_from(
    ["llama", "qwen3", "gpt2", "bert", "t5", "pruned_llama", "float8_e4m3fn", "int8", "gelu", "fp8", "bitsandbytes"]
)
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]


@examples(60)
@given(name=MODELS, data=st.data())
def test_a_config_with_other_values_is_accepted_or_refused(folder: Path, name: str, data) -> None:
    config = json.loads((folder / name / "config.json").read_text())
    keys = data.draw(st.lists(st.sampled_from(CONFIG_KEYS), min_size=1, max_size=2))
    config |= {key: data.draw(st.one_of(JSON_VALUES, CONFIG_TEXTS, st.integers(1, 64))) for key in keys}
    with Changed(folder / name / "config.json", json.dumps(config).encode()):
        read_everything(folder / name, "models, config")


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".json")])
@examples(15)
@given(name=MODELS, data=st.data())
def test_a_json_file_with_another_value_is_accepted_or_refused(folder: Path, file: str, name: str, data) -> None:
    value = data.draw(altered_json(json.loads((folder / name / file).read_text())))
    with Changed(folder / name / file, json.dumps(value).encode()):
        read_everything(folder / name, f"models, {file}")


@pytest.mark.parametrize("file", FILES)
@examples(8)
@given(name=MODELS, data=st.data())
def test_a_damaged_file_is_accepted_or_refused(folder: Path, file: str, name: str, data) -> None:
    with Changed(folder / name / file, data.draw(damaged((folder / name / file).read_bytes()))):
        read_everything(folder / name, "models, damaged")


@examples(30)
@given(name=MODELS, data=st.data())
def test_weights_with_an_altered_header_are_accepted_or_refused(folder: Path, name: str, data) -> None:
    path = folder / name / "model.safetensors"
    with Changed(path, data.draw(with_altered_header(path.read_bytes()))):
        read_everything(folder / name, "models, header")


@examples(40)
@given(name=MODELS, data=st.data())
def test_weights_with_another_tensor_are_accepted_or_refused(folder: Path, name: str, data) -> None:
    """A tensor is missing, renamed, of another shape or dtype, or NaN."""
    path = folder / name / "model.safetensors"
    tensors = load_file(path)
    key = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(key)
    match data.draw(st.sampled_from(["missing", "renamed", "shape", "scalar", "empty", "dtype", "nan"])):
        case "renamed":
            tensors[data.draw(st.sampled_from(["x", "", "model.layers.9.mlp.up_proj.weight", f"{key}.extra"]))] = tensor
        case "shape":
            tensors[key] = tensor[..., : data.draw(st.integers(0, 7))].contiguous()
        case "scalar":
            tensors[key] = tensor.flatten()[0].clone()
        case "empty":
            tensors[key] = torch.empty(0)
        case "dtype":
            kinds = [
                torch.int8,
                torch.bool,
                torch.float64,
                torch.float16,
                torch.uint8,
                torch.complex64,
                torch.float8_e4m3fn,
            ]
            tensors[key] = tensor.to(data.draw(st.sampled_from(kinds)))
        case "nan":
            tensors[key] = tensor * float("nan")
    with Changed(path, save(tensors, metadata={"format": "pt"})):
        read_everything(folder / name, "models, tensors")


INDEXES = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries({"weight_map": JSON_VALUES}),
    st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from(["x", "lm_head.weight"]), JSON_VALUES, max_size=2)}
    ),
)


@examples(30)
@given(name=MODELS, value=INDEXES)
def test_any_index_is_accepted_or_refused(folder: Path, name: str, value) -> None:
    with Changed(folder / name / INDEX, json.dumps(value).encode()):
        read_everything(folder / name, "models, index")


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b"null", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", b"\0" * 64]
)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_nonsense_is_accepted_or_refused(file: str, content: bytes | None, folder: Path) -> None:
    with Changed(folder / "llama-gqa" / file, content):
        read_everything(folder / "llama-gqa", "models, nonsense")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_unchanged_models_are_accepted(architecture: str, folder: Path) -> None:
    """The tests above have restored every file, and their models would have been read."""
    kind = f"models, unchanged {architecture}"
    mask = keep_first(tiny_model(architecture), [(4 - layer, 9 + layer) for layer in range(4)])
    read_everything(folder / architecture, kind, mask)
    assert [tried[f"{kind}{reader}, refused"] for reader in ("", ", doctor", ", export")] == [0, 0, 0]


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_dim": 7},
        {"head_dim": 1},
        {"head_dim": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_attention_heads": 6, "num_key_value_heads": 4},
        {"intermediate_size": 1},
        {"num_hidden_layers": 0},
        {"hidden_size": 0},
    ],
    ids=str,
)
def test_a_model_of_odd_sizes_is_accepted_or_refused(sizes: dict[str, int], folder: Path) -> None:
    """The weights fit the config if transformers can build such a model at all."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama-gqa")
    for name, value in sizes.items():
        setattr(config, name, value)
    odd = folder / "odd"
    save_tokenizer(odd)
    try:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(odd)
    except Exception:  # transformers cannot build it, but the config can still be read
        write(odd / "config.json", json.dumps(config.to_dict(), default=str).encode())
        save_file({"model.norm.weight": torch.ones(32)}, odd / "model.safetensors", metadata={"format": "pt"})
    read_everything(odd, "models, odd sizes")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tokenizer_of_another_model_is_refused(architecture: str, folder: Path) -> None:
    """The tokenizer has 300 tokens, the model embeds 96."""
    kind = f"models, tokenizer of another, {architecture}"
    save_tokenizer(folder / "other", 300)
    with Changed(folder / architecture / "tokenizer.json", (folder / "other" / "tokenizer.json").read_bytes()):
        read_everything(folder / architecture, kind)
    assert tried[f"{kind}, refused"] == 1
