"""From a name to a model's files: every kind of name, every refusal, and the fingerprint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.messages import refused
from helpers.models import save_shards

from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import DEMO_MODEL, INDEX, Source, find_local, resolve


def make(folder: Path, *names: str) -> Path:
    """Create empty files: `resolve` only looks at names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


# --- names


def test_demo_is_the_model_that_ships_with_the_package() -> None:
    source = resolve("demo")
    assert source == Source("demo", DEMO_MODEL, None)
    assert source.weight_files() == [DEMO_MODEL / "model.safetensors"]


def test_a_directory_with_safetensors_is_found(saved: Path) -> None:
    assert resolve(str(saved)) == Source(str(saved), saved, None)


def test_weight_files_are_listed_in_the_order_of_the_index(damaged: Path) -> None:
    source = resolve(str(save_shards(damaged)))
    assert source.weight_files() == [damaged / "two.safetensors", damaged / "one.safetensors"]


def test_a_path_may_be_relative_or_start_at_home(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert resolve("model") == Source("model", Path("model"), None)
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve("~/model") == Source("~/model", saved, None)


def test_a_gguf_file_is_found(tmp_path: Path) -> None:
    file = make(tmp_path / "quantised", "x-Q8_0.gguf", "x-Q4_K.gguf") / "x-Q8_0.gguf"
    source = resolve(str(file))
    assert source == Source(str(file), file.parent, "x-Q8_0.gguf")
    assert source.weight_files() == [file]


def test_a_directory_with_one_gguf_file_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path / "quantised", "x.gguf", "README.md")
    assert resolve(str(folder)) == Source(str(folder), folder, "x.gguf")


@pytest.mark.parametrize("weights", [True, False])
def test_a_gguf_file_beside_a_config_is_found(weights: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "quantised", "x.gguf", "config.json")
    assert resolve(str(folder), weights) == Source(str(folder), folder, "x.gguf")
    make(folder, "model.safetensors")
    assert resolve(str(folder), weights) == Source(str(folder), folder, None)


def test_a_directory_named_like_a_gguf_file_is_not_one(tmp_path: Path) -> None:
    make(tmp_path, "a.gguf")
    (tmp_path / "b.gguf").mkdir()
    assert find_local(str(tmp_path)).gguf == "a.gguf"


def test_an_empty_name_is_refused() -> None:
    with refused("model is empty"):
        find_local(" ")


def test_a_directory_with_several_gguf_files_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "quantised", "b.gguf", "a.gguf")
    with refused(f"{folder}: holds 2 GGUF files", "a.gguf, b.gguf"):
        resolve(str(folder))
    make(folder, "config.json")
    with refused(f"{folder}: holds 2 GGUF files", "a.gguf, b.gguf"):
        resolve(str(folder))


def test_a_directory_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "old", "config.json", "pytorch_model.bin")
    with refused(str(folder), "neither model.safetensors nor", INDEX, "pgprune convert"):
        resolve(str(folder))


def test_safetensors_are_used_when_pickles_exist_too(damaged: Path) -> None:
    (damaged / "pytorch_model.bin").touch()
    assert resolve(str(damaged)).weight_files() == [damaged / "model.safetensors"]


def test_directories_and_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "empty")
    with refused(f"{folder}: holds neither config.json with safetensors nor a .gguf file"):
        resolve(str(folder))
    folder = make(tmp_path / "half", "config.json")
    with refused(f"{folder}: has config.json", "neither model.safetensors nor"):
        resolve(str(folder))
    file = make(tmp_path / "half", "model.safetensors") / "model.safetensors"
    with refused(f"{file}: not a model", "a .gguf file or a hub name"):
        resolve(str(file))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./owner/name", "models/x", "owner/na me", "demo2", "../x", ""])
def test_a_name_that_cannot_be_on_the_hub_is_refused_without_asking_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError(f"asked the hub for {name!r}")

    monkeypatch.chdir(make(tmp_path / "here"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    with refused(*((f"{name}: ", "no such directory or .gguf file") if name else ("the name of the model is empty",))):
        resolve(name)


# --- the hub


def test_a_hub_model_is_downloaded_without_pickles_and_code(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(name: str, **options: list[str]) -> str:
        calls.append((name, options["allow_patterns"]))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/some.model-1") == Source("owner/some.model-1", saved, None)
    [(name, patterns)] = calls
    assert name == "owner/some.model-1"
    files = ("model.safetensors", INDEX, "config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model")
    for file in (*files, "LICENSE", "LICENSE.txt", "NOTICE"):  # an export has the licence, too
        assert any(fnmatch(file, pattern) for pattern in patterns), file
    for file in ("pytorch_model.bin", "modeling_x.py", "model.gguf", "consolidated.00.pth"):
        assert not any(fnmatch(file, pattern) for pattern in patterns), file


@pytest.mark.parametrize(
    ("downloaded", "on_hub", "facts"),
    [
        (None, ["README.md", "x-Q4_K_M.gguf"], ("GGUF", "hf download owner/name FILE.gguf")),
        (["config.json"], ["config.json", "x.gguf"], ("GGUF", "hf download owner/name FILE.gguf")),
        (["config.json"], ["config.json", "pytorch_model.bin"], ("pgprune convert",)),
        (None, ["README.md"], ("no model with safetensors",)),
        (None, None, ("no model with safetensors",)),
    ],
    ids=["gguf", "gguf-and-config", "pickles", "nothing", "unreachable"],
)
def test_a_repository_without_safetensors_is_refused(
    downloaded: list[str] | None,
    on_hub: list[str] | None,
    facts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Api:
        def list_repo_files(self, name: str) -> list[str]:
            if on_hub is None:
                raise TimeoutError
            return on_hub

    snapshot = tmp_path / "snapshot"  # absent if no file of the repository matches the patterns
    if downloaded is not None:
        make(snapshot, *downloaded)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with refused("owner/name", *facts):
        resolve("owner/name")


def test_the_config_of_a_hub_model_is_read_beside_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is left of another download, and the model may have safetensors on the hub."""
    make(tmp_path, "config.json", "x.gguf")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert resolve("owner/name", weights=False) == Source("owner/name", tmp_path, None, has_weights=False)


def test_a_hub_that_cannot_be_reached_is_reported_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("Cannot find\nan appropriate   cached snapshot folder")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with refused("owner/name: ", "(Cannot find an appropriate cached snapshot folder)", "`model:`"):
        resolve("owner/name")


def test_the_cache_of_the_hub_is_where_hf_home_says(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    make(snapshot, "config.json", "model.safetensors")
    code = "from pgprune_cli.model.source import resolve; print(resolve('me/tiny').directory)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.stdout == f"{snapshot}\n", process.stderr


# --- weight files


def test_a_missing_shard_is_refused(damaged: Path) -> None:
    source = resolve(str(save_shards(damaged)))
    (damaged / "one.safetensors").unlink()
    with refused(f"{damaged / 'one.safetensors'}: missing"):
        source.weight_files()
    with refused(f"{damaged / 'one.safetensors'}: missing"):
        load_model(source, "auto", "cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_damaged_index_is_refused(damaged: Path, content: str) -> None:
    (damaged / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        resolve(str(damaged)).weight_files()
    assert str(caught.value).startswith(f"{damaged / INDEX}: ")


def test_an_index_without_a_weight_map_is_refused(damaged: Path) -> None:
    (damaged / INDEX).write_text(json.dumps({"metadata": {}}))
    with refused(f"{damaged / INDEX}: ", "weight_map"):
        resolve(str(damaged)).weight_files()
