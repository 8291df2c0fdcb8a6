"""Converting pickled checkpoints to safetensors keeps the weights and runs no code in the pickles."""

import errno
import json
import resource
import shutil
import tomllib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.messages import refused
from helpers.models import tiny_model
from packaging.requirements import Requirement
from safetensors.torch import load_file

from pgprune_cli.errors import RunError
from pgprune_cli.jobs.convert import convert
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import CONVERTED, INDEX, resolve
from pgprune_cli.recipe.reader import find, load, shipped

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("files", [1, 3])
def test_a_converted_checkpoint_has_the_same_weights(files: int, tmp_path: Path) -> None:
    model, old = tiny_model("llama-gqa"), tmp_path / "old"
    model.config.save_pretrained(old)
    beside = {name: f"the {name}" for name in ("tokenizer.model", "LICENSE", "chat_template.jinja")}
    for name, content in {**beside, "training_args.bin": "of no use"}.items():
        (old / name).write_text(content)
    state = list(model.state_dict().items())  # the tied head and embedding share memory
    names = ["pytorch_model.bin"] if files == 1 else [f"pytorch_model-{i}-of-{files}.bin" for i in range(files)]
    for index, name in enumerate(names):
        torch.save(dict(state[index::files]), old / name)
    written = convert(str(old), tmp_path / "new")
    assert len(written) == files
    for name, content in beside.items():
        assert (tmp_path / "new" / name).read_text() == content
    assert not (tmp_path / "new" / "training_args.bin").exists()
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


def test_integers_masks_and_parameters_are_converted(tmp_path: Path) -> None:
    tensors = {"ids": torch.arange(5), "mask": torch.ones(2, 3).tril().bool(), "scale": torch.tensor(2.5)}
    (tmp_path / "old").mkdir()
    torch.save({**tensors, "weight": torch.nn.Parameter(torch.ones(3))}, tmp_path / "old" / "pytorch_model.bin")
    (file,) = convert(str(tmp_path / "old"), tmp_path / "new")
    stored = load_file(file)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(stored["weight"], torch.ones(3))


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()])
def test_a_tensor_that_safetensors_cannot_hold_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save({"odd": tensor}, tmp_path / "old" / "pytorch_model.bin")
    with refused("pytorch_model.bin", "odd"):
        convert(str(tmp_path / "old"), tmp_path / "new")


def pickled_in_three(folder: Path) -> None:
    """Write three pickles of two tensors each."""
    folder.mkdir()
    for number in range(3):
        tensors = {f"{number}.{part}": torch.ones(500) for part in "ab"}
        torch.save(tensors, folder / f"pytorch_model-{number}.bin")


def test_a_full_disk_is_refused_before_the_conversion_or_is_an_error_that_names_it(tmp_path: Path, monkeypatch) -> None:
    pickled_in_three(tmp_path / "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with refused(str(tmp_path / "new"), "of disk", error=RunError):
            convert(str(tmp_path / "old"), tmp_path / "new")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError) as failed:
            convert(str(tmp_path / "old"), tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_is_no_longer_in_memory_when_the_next_one_is_read(tmp_path: Path, monkeypatch) -> None:
    pickled_in_three(tmp_path / "old")
    load, read = torch.load, []

    def watched(*arguments: object, **options: object) -> dict[str, torch.Tensor]:
        assert [tensor for tensor in read if tensor() is not None] == []
        state = load(*arguments, **options)
        read.extend(map(weakref.ref, state.values()))
        return state

    monkeypatch.setattr(torch, "load", watched)
    assert len(convert(str(tmp_path / "old"), tmp_path / "new")) == 3
    assert len(read) == 6


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
