"""Files are written atomically, and damaged ones are refused."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from safetensors.torch import save

from pgprune_cli.storage.atomic import new_directory, new_file, scratch_file, sync, write_bytes
from pgprune_cli.storage.records import checksum, read_json, read_tensors, write_json


def names(folder: Path) -> list[str]:
    """Return the names of all files in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_write_bytes_creates_missing_folders(tmp_path):
    content = bytes(range(256)) * 1000
    write_bytes(tmp_path / "a" / "b" / "x.bin", content)
    assert (tmp_path / "a" / "b" / "x.bin").read_bytes() == content
    assert names(tmp_path / "a" / "b") == ["x.bin"]


def test_write_bytes_replaces_a_file(tmp_path):
    write_bytes(tmp_path / "x", b"a longer one")
    write_bytes(tmp_path / "x", b"short")
    assert (tmp_path / "x").read_bytes() == b"short"


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_write_bytes_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, fails, before):
    if before is not None:
        (tmp_path / "x").write_bytes(before)
    monkeypatch.setattr(fails, failing)
    with pytest.raises(OSError, match="No space left on device"):
        write_bytes(tmp_path / "x", b"new")
    assert names(tmp_path) == ([] if before is None else ["x"])
    if before is not None:
        assert (tmp_path / "x").read_bytes() == before


def test_write_bytes_syncs_the_content_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(handle: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file"
        events.append(f"sync {kind}")
        fsync(handle)

    def recorded_replace(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"content"
        events.append("rename")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to distinguish the handle of a folder from that of a file")
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    write_bytes(tmp_path / "x", b"content")
    assert events == ["sync file", "rename", "sync folder"]


def test_write_bytes_replaces_the_leftover_of_a_killed_writer(tmp_path):
    (tmp_path / f".x.{os.getpid()}.tmp").write_bytes(b"half of something much longer")
    write_bytes(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert names(tmp_path) == ["x"]


def test_json_is_read_back_equal_and_written_with_one_line_per_value(tmp_path):
    value = {"θ": [0.1, 1e-300, None, True], "name": "zwölf"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value
    assert "θ" in text and text.endswith("}\n") and text.count("\n") > 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_write_json_refuses_values_that_are_not_finite(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "cannot be read"),
        (b'{"step": 1', "cannot be read"),
        (b'{"step": "\xff"}', "cannot be read"),
        (b"[1, 2]", "got a list"),
        (b"null", "got nothing"),
    ],
)
def test_read_json_refuses_a_damaged_file(tmp_path, content, fact):
    (tmp_path / "x.json").write_bytes(content)
    with refused(f"{tmp_path / 'x.json'}: ", fact):
        read_json(tmp_path / "x.json")


def test_read_json_refuses_a_missing_file(tmp_path):
    with refused(f"{tmp_path / 'x.json'}: ", "No such file"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("end", [0, 7, 20, -1])
def test_read_tensors_refuses_a_truncated_file(tmp_path, end):
    whole = save({"a": torch.arange(10.0)})
    (tmp_path / "x.safetensors").write_bytes(whole)
    assert read_tensors(tmp_path / "x.safetensors")["a"].equal(torch.arange(10.0))
    (tmp_path / "x.safetensors").write_bytes(whole[:end])
    with refused(f"{tmp_path / 'x.safetensors'}: damaged"):
        read_tensors(tmp_path / "x.safetensors")


def test_read_tensors_refuses_a_missing_file(tmp_path):
    with refused(f"{tmp_path / 'x.safetensors'}: ", "No such file"):
        read_tensors(tmp_path / "x.safetensors")


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert checksum(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_sync_closes_its_handle_when_it_fails(tmp_path, monkeypatch):
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(real_open(*arguments)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or real_close(handle))
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        sync(tmp_path)
    assert len(opened) == 1 and closed == opened


def test_json_floats_are_read_back_exactly(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 2.0**53 + 2]
    write_json(tmp_path / "x.json", {"values": values})
    assert read_json(tmp_path / "x.json")["values"] == values
    assert json.loads((tmp_path / "x.json").read_text())["values"] == values


@pytest.mark.parametrize("new", [new_file, new_directory])
def test_new_path_appears_only_when_it_is_complete(new, tmp_path):
    out = tmp_path / "folder" / "out"

    def fill(path):
        (path / "part" if new is new_directory else path).write_text("whole")
        assert not out.exists()

    with pytest.raises(RuntimeError, match="half-way"), new(out) as temporary:
        fill(temporary)
        raise RuntimeError("half-way")
    assert list(out.parent.iterdir()) == []
    with new(out) as temporary:
        fill(temporary)
    assert list(out.parent.iterdir()) == [out]
    assert (out / "part" if new is new_directory else out).read_text() == "whole"


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 250 + ".gguf"])
@pytest.mark.parametrize("new", [new_file, new_directory, scratch_file])
def test_names_as_long_as_a_file_system_allows_are_written(new, name, tmp_path):
    for _ in range(2):  # the second one looks for leftovers of the first
        with new(tmp_path / name) as temporary:
            (temporary / "part" if new is new_directory else temporary).write_text("whole")
            if new is new_directory and (tmp_path / name).exists():
                (tmp_path / name / "part").unlink()
    assert names(tmp_path) == ([] if new is scratch_file else [name])


def test_new_file_removes_the_leftovers_of_a_long_name_only(tmp_path):
    with new_file(tmp_path / ("n" * 255)) as temporary:
        leftover = temporary.with_name(temporary.name.replace(str(os.getpid()), "1"))
    for other in (leftover, leftover.with_name(leftover.name.replace("1.tmp", "x.txt"))):
        other.write_text("half")
    write_bytes(tmp_path / ("n" * 255), b"whole")
    assert leftover.name not in names(tmp_path)
    assert len(names(tmp_path)) == 2
