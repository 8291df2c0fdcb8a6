"""Which dense model teaches a student, and which cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.exports import export
from helpers.masks import draw
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_config, tiny_model
from transformers import AutoTokenizer

from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recover.checks import find_teacher, refuse_other_vocabulary, streams_to_match
from pgprune_cli.run.layout import DECISION_RECORD


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model, and with a student that lacks its first and third layer."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("llama-gqa")
    model.save_pretrained(folder / "dense")
    save_tokenizer(folder / "dense")
    export(folder / "dense", folder / "student", draw(model, [(0, 0), (3, 11), (0, 0), (1, 24)]))
    return folder


@pytest.fixture
def student(models: Path) -> Source:
    return resolve(str(models / "student"))


def test_dense_model_of_the_decision_teaches_unless_another_is_given(models: Path, student: Source) -> None:
    assert find_teacher(student).directory == models / "dense"
    assert find_teacher(student, "demo").name == "demo"


def test_model_itself_is_refused_as_its_teacher(models: Path, student: Source) -> None:
    (models / "link").symlink_to("student")
    with refused("link", "the model to recover", "--teacher"):
        find_teacher(student, str(models / "link"))


def test_teacher_that_is_unknown_missing_or_changed_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models", symlinks=True)
    student, dense = tmp_path / "models" / "student", models / "dense"
    weights = (dense / "model.safetensors").read_bytes()
    (dense / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with refused("dense", "not the model that was searched"):
        find_teacher(resolve(str(student)))
    assert find_teacher(resolve(str(student)), str(dense)).directory == dense
    (dense / "model.safetensors").write_bytes(weights)
    dense.rename(models / "elsewhere")
    with refused("dense", "missing", "--teacher"):
        find_teacher(resolve(str(student)))
    (models / "elsewhere").rename(dense)
    (student / DECISION_RECORD).unlink()
    with refused("student", DECISION_RECORD, "--teacher"):
        find_teacher(resolve(str(student)))


def test_vocabularies_must_mean_the_same(models: Path, student: Source, tmp_path: Path) -> None:
    dense = resolve(str(models / "dense"))
    config, tokenizer = tiny_config("llama-gqa"), AutoTokenizer.from_pretrained(dense.directory)
    refuse_other_vocabulary(student, config, tokenizer, dense, config, tokenizer)
    larger = tiny_config("llama-gqa")
    larger.vocab_size = 128
    with refused("dense", "128 tokens", "96", "--teacher"):
        refuse_other_vocabulary(student, config, tokenizer, dense, larger, tokenizer)
    save_tokenizer(tmp_path, splitter=None, bos_token="<other>")  # one token more does not matter
    refuse_other_vocabulary(student, config, tokenizer, dense, config, AutoTokenizer.from_pretrained(tmp_path))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"A": ', '"AA": '))
    with refused("dense", "another meaning to 1 of the ", "'AA'", "--teacher"):
        refuse_other_vocabulary(student, config, tokenizer, dense, config, AutoTokenizer.from_pretrained(tmp_path))


def test_streams_are_matched_by_the_layers_that_are_kept(models: Path, student: Source) -> None:
    dense, config = resolve(str(models / "dense")), tiny_config("llama-gqa")
    assert streams_to_match(student, config, dense, config) == [0, 1, 2, 3]
    pruned = tiny_config("llama-gqa")
    pruned.num_hidden_layers = 2
    assert streams_to_match(student, pruned, dense, config) == [2, 3]
    pruned.num_hidden_layers = 3
    with refused("recover.hidden", "3 layers", "has 4"):
        streams_to_match(student, pruned, dense, config)
    pruned.hidden_size = 16
    with refused("recover.hidden", "32 channels", "16"):
        streams_to_match(student, pruned, dense, config)
