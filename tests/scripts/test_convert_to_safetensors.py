"""Converting pickled checkpoints to safetensors keeps the weights and runs no code in the pickles."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from helpers.scripts import script_module

from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import resolve


@pytest.fixture(scope="module")
def convert():
    return script_module("convert_to_safetensors").convert


@pytest.mark.parametrize("files", [1, 3])
def test_a_converted_checkpoint_has_the_same_weights(convert, files: int, tmp_path: Path) -> None:
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


def test_code_in_a_pickle_does_not_run_and_leaves_nothing(convert, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    old = tmp_path / "old"
    old.mkdir()
    torch.save({"weight": Touch()}, old / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        convert(str(old), tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_an_existing_directory_is_not_overwritten(convert, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
        convert("any", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
