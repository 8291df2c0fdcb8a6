"""The fingerprint of a model changes with everything that a search or an export computes with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.models import save_shards, save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

from pgprune_cli.model import fingerprint
from pgprune_cli.model.fingerprint import difference
from pgprune_cli.model.source import resolve


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def parts(model: Path) -> dict[str, str]:
    return resolve(str(model)).fingerprint_parts()


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(model: Path, edit) -> None:
    """Apply `edit` to the tensors of a model's file, by name."""
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("whole", [True, False])
def test_an_edit_of_any_single_matrix_is_noticed_and_named(
    whole: bool, original: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:  # as of a model of many gigabytes
        monkeypatch.setattr(fingerprint, "READ_WHOLE", 0)
        monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 8)
    before, file = parts(original), (model / "model.safetensors").read_bytes()
    for name in load_file(original / "model.safetensors"):
        edit_tensors(model, lambda tensors, name=name: tensors[name].mul_(-3))
        layer = ".".join(name.split(".")[:3]) if "layers" in name else name
        assert difference(before, parts(model)) == layer
        (model / "model.safetensors").write_bytes(file)
    assert parts(model) == before


def test_a_change_of_dtype_or_shape_alone_is_noticed(original: Path, model: Path) -> None:
    import torch

    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name].view(tensors[name].shape[::-1])}))
    assert difference(parts(original), parts(model)) == "model.layers.1"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name].view(torch.int32)}))
    assert difference(parts(original), parts(model)) == "model.layers.1"


def test_samples_reach_from_the_first_byte_to_the_last(monkeypatch) -> None:
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 64)
    monkeypatch.setattr(fingerprint, "BYTES_AT_A_TIME", 64)
    samples = list(fingerprint._samples(100, 10_100, whole=False))
    assert samples[0] == (100, 64) and samples[-1] == (10_036, 64)
    assert len(samples) == fingerprint.SAMPLES
    for whole, end in ((True, 10_100), (False, 600)):
        samples = fingerprint._samples(100, end, whole=whole)
        assert [byte for start, size in samples for byte in range(start, start + size)] == list(range(100, end))


@pytest.mark.parametrize(
    ("file", "key"),
    [("config.json", "rms_norm_eps"), ("config.json", "rope_parameters"), ("tokenizer_config.json", "eos_token")],
)
def test_an_edited_config_is_noticed_and_its_key_named(file: str, key: str, original: Path, model: Path) -> None:
    edit_json(model / file, **{key: "another"})
    assert difference(parts(original), parts(model)) == f"{file}: {key}"


def test_an_edited_or_missing_tokenizer_is_noticed(original: Path, model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"</s>"', '"<end>"'))
    assert difference(parts(original), parts(model)) == "tokenizer.json"
    path.unlink()
    assert difference(parts(original), parts(model)) == "tokenizer.json"


def test_what_has_no_effect_is_not_noticed(original: Path, model: Path) -> None:
    edit_json(model / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    edit_json(model / "tokenizer_config.json", chat_template="{{ messages }}")
    (model / "README.md").write_text("Edited")
    save_shards(model)
    assert parts(model) == parts(original)


def test_a_difference_names_three_parts_in_the_order_of_layers() -> None:
    before = {f"model.layers.{layer}": "a" for layer in range(12)}
    assert difference(before, {}) == "model.layers.0, model.layers.1, model.layers.2 and 9 more"
    assert difference(before, before | {"model.layers.10": "b", "model.layers.9": "b"}) == (
        "model.layers.9, model.layers.10"
    )


def test_an_edit_of_a_gguf_file_is_noticed_and_named(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    def written(name: str, scale: float = 1.0, theta: float = 10000.0, title: str = "x") -> dict[str, str]:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_name(title)
        writer.add_chat_template(title)
        writer.add_block_count(2)
        writer.add_rope_freq_base(theta)
        for layer in range(2):
            matrix = np.full((4, 4), scale if layer else 1.0, dtype=np.float32)
            writer.add_tensor(f"blk.{layer}.attn_q.weight", matrix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return resolve(str(tmp_path / name)).fingerprint_parts()

    before = written("a.gguf")
    assert difference(before, written("b.gguf", scale=2.0)) == "blk.1"
    assert difference(before, written("c.gguf", theta=5e5)) == "llama.rope.freq_base"
    assert written("d.gguf", title="another") == before
