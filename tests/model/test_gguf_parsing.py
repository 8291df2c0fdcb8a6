"""A GGUF file is parsed once for its config, tokenizer and weights, and everything is as before afterwards."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from helpers.masks import dense_mask
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_model

from pgprune_cli.export import gguf as writer
from pgprune_cli.export.plan import Options
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.model.gguf_header import read_header
from pgprune_cli.model.gguf_parsing import parsed_once
from pgprune_cli.model.loading import check_weights, empty_prunable, load_model, load_tokenizer
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.run.decision import Decision


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A tiny model in one GGUF file."""
    tiny_model("llama-mha").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    dense, mask = resolve(str(tmp_path / "dense")), dense_mask(tiny_model("llama-mha"))
    decision = Decision(mask, str(tmp_path), dense.fingerprint(), 0.0, "dtype: float32\n", 0, 0, 0, None)
    plan = writer.plan(dense, decision, Options(ShapeRequirements(), "float32"))
    plan.write(tmp_path / "dense.gguf", lambda _: None)
    return resolve(str(tmp_path / "dense.gguf"))


def test_a_gguf_file_is_parsed_once_and_read_as_before(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, parsed = gguf.GGUFReader, []

    def counting(path: str) -> gguf.GGUFReader:
        parsed.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counting)
    expected, vocabulary = load_model(source, "float32", "cpu").state_dict(), load_tokenizer(source).get_vocab()
    assert len(parsed) > 1
    parsed.clear()
    with parsed_once(source):
        actual = load_model(source, "float32", "cpu").state_dict()
        assert load_tokenizer(source).get_vocab() == vocabulary
    assert len(parsed) == 1
    assert gguf.GGUFReader is counting
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_other_formats_leave_the_library_alone(source: Source) -> None:
    before = gguf.GGUFReader
    with parsed_once(resolve(str(source.directory / "dense"))):
        assert gguf.GGUFReader is before


def test_a_gguf_file_without_some_of_its_tensors_is_refused_by_its_header(source: Source) -> None:
    """Its header describes a layer more than it holds."""
    path = source.directory / source.gguf
    _, end = read_header(path).entries["llama.block_count"]
    with path.open("r+b") as file:
        file.seek(end - 4)
        layers = int.from_bytes(file.read(4), "little")
        file.seek(end - 4)
        file.write((layers + 1).to_bytes(4, "little"))
    damaged = resolve(str(path))
    with refused("dense.gguf", "its header describes", "hold only"):
        check_weights(damaged, empty_prunable(damaged, "float32").module)
