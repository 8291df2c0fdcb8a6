"""Converting pickled checkpoints to safetensors keeps the weights and runs no code in the pickles."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.models import tiny_model
from packaging.requirements import Requirement

from pgprune_cli.jobs.convert import convert
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import CONVERTED, INDEX, resolve
from pgprune_cli.recipe.reader import find, load, shipped

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("files", [1, 3])
def test_a_converted_checkpoint_has_the_same_weights(files: int, tmp_path: Path) -> None:
    model, old = tiny_model("llama-gqa"), tmp_path / "old"
    model.config.save_pretrained(old)
    state = list(model.state_dict().items())  # the tied head and embedding share memory
    names = ["pytorch_model.bin"] if files == 1 else [f"pytorch_model-{i}-of-{files}.bin" for i in range(files)]
    for index, name in enumerate(names):
        torch.save(dict(state[index::files]), old / name)
    written = convert(str(old), tmp_path / "new")
    assert len(written) == files
    assert {path.name for path in written} <= {path.name for path in (tmp_path / "new").iterdir()}
    loaded = load_model(resolve(str(tmp_path / "new")), "auto", "cpu")
    for name, tensor in state:
        assert torch.equal(loaded.state_dict()[name], tensor)
    if files > 1:
        index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == {name for name, _ in state}


def test_code_in_a_pickle_does_not_run_and_leaves_nothing(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    old = tmp_path / "old"
    old.mkdir()
    torch.save({"weight": Touch()}, old / "pytorch_model.bin")
    with refused(str(old / "pytorch_model.bin"), "without running code"):
        convert(str(old), tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.ones(2)}}, {"epoch": 3}, torch.ones(2)])
def test_a_pickle_of_other_values_than_tensors_is_refused(content: object, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    torch.save(content, old / "pytorch_model.bin")
    with refused(str(old / "pytorch_model.bin"), next(iter(content)) if isinstance(content, dict) else "Tensor"):
        convert(str(old), tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_a_foreign_index_does_not_replace_the_one_of_the_new_files(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for number in (1, 2):
        torch.save({f"weight{number}": torch.ones(2)}, old / f"pytorch_model-{number}.bin")
    (old / INDEX).write_text(json.dumps({"weight_map": {"weight1": "elsewhere.safetensors"}}))
    written = convert(str(old), tmp_path / "new")
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert list(index["weight_map"].values()) == [path.name for path in written]


def test_a_link_to_an_empty_directory_is_followed(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    torch.save({"weight": torch.ones(2)}, old / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    convert(str(old), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "model.safetensors").exists()


def test_a_directory_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").touch()
    (tmp_path / "precious").touch()
    with refused(str(tmp_path), "not an empty directory"):
        convert(str(tmp_path / "old"), tmp_path)
    assert (tmp_path / "precious").exists()


def test_a_model_without_pickles_is_refused(tmp_path: Path) -> None:
    with refused(str(tmp_path), "pytorch_model*.bin"):
        convert(str(tmp_path), tmp_path / "new")
    with refused("no/such/model", "no such directory"):
        convert("no/such/model", tmp_path / "new")


def test_a_recipe_whose_model_is_not_converted_yet_says_how(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("pgprune convert lmsys/vicuna-7b-v1.5 models/vicuna-7b"):
        resolve(load(find("vicuna-7b-20")).model)
    assert set(CONVERTED) == {model for name in shipped() if (model := load(name).model).startswith("models/vicuna")}


def test_the_tokenizer_of_a_converted_model_needs_no_extra(tmp_path: Path) -> None:
    """Vicuna has a tokenizer.model alone."""
    required = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert {"sentencepiece", "protobuf"} <= required
