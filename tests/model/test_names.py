"""What a model is called: hub names, and paths of every system."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.messages import refused

from pgprune_cli.model.names import absolute_name, is_hub_name, short_name
from pgprune_cli.model.source import find_local, find_recorded, resolve_recorded


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("meta-llama/Llama-3.2-1B", True),
        ("demo", False),
        ("gpt2", False),
        ("./ckpt/step1", False),
        ("../name", False),
        ("~/name", False),
        ("/data/name", False),
        (r"ckpt\step1", False),
        (r"C:\models\mine", False),
        ("C:/models", False),
        ("a/b/c", False),
        ("owner/name/", False),
        ("out/typo.gguf", False),
        ("out/model.safetensors", False),
        ("models/mine", False),
        ("runs/mine", False),
        ("https://huggingface.co/owner/name", False),
    ],
)
def test_is_hub_name_takes_no_path(name: str, expected: bool) -> None:
    assert is_hub_name(name) is expected


def test_absolute_name_names_the_same_model_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ckpt" / "step1").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("ckpt/step1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    step = str(tmp_path / "ckpt" / "step1")
    assert absolute_name("ckpt/step1/") == absolute_name("~/ckpt/step1") == absolute_name(step) == step
    assert absolute_name("latest") == str(tmp_path / "latest")  # a link is followed anew each time
    assert absolute_name("latest/../step1") == step  # not ckpt's parent: `..` goes up from where the link leads
    assert [absolute_name(name) for name in ("demo", "owner/name", "gone")] == ["demo", "owner/name", "gone"]


def test_short_name_is_the_last_part_on_every_system() -> None:
    names = ("owner/name", "/data/name", "/data/name/", r"C:\models\name", "name")
    assert {short_name(name) for name in names} == {"name"}


@pytest.mark.parametrize("name", ["ckpt/step2", "out/typo.gguf", "./ckpt", r"ckpt\step1"])
def test_a_missing_local_model_is_not_asked_of_the_hub(name, tmp_path, monkeypatch) -> None:
    (tmp_path / "ckpt" / "step1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    (tmp_path / "ckpt" / "step1").rmdir()
    if name == "./ckpt":
        (tmp_path / "ckpt").rmdir()
    with refused(f"{name}: "):
        find_local(name)


def test_a_hub_name_in_a_run_is_no_local_folder_of_that_name(tmp_path, monkeypatch, saved) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_local("owner/name").directory == Path("owner/name")
    assert resolve_recorded("owner/name").directory == saved
    assert find_recorded("owner/name").directory == saved
    assert asked == ["owner/name"] * 2


def test_find_recorded_finds_nothing_instead_of_raising(tmp_path: Path) -> None:
    assert find_recorded(str(tmp_path / "gone")) is None
    assert find_recorded("owner/never-downloaded") is None
    assert find_recorded("demo") is not None
