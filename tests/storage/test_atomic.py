"""Files are whole or absent, and a damaged one is refused in words."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import new_directory, new_file, sync_directory, write_bytes
from pgprune_cli.storage.records import checksum, read_json, read_tensors, write_json


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_bytes_arrive_as_they_are_in_folders_made_for_them(tmp_path):
    content = bytes(range(256)) * 1000
    write_bytes(tmp_path / "a" / "b" / "x.bin", content)
    assert (tmp_path / "a" / "b" / "x.bin").read_bytes() == content
    assert names(tmp_path / "a" / "b") == ["x.bin"]


def test_a_file_is_replaced(tmp_path):
    write_bytes(tmp_path / "x", b"a longer one")
    write_bytes(tmp_path / "x", b"short")
    assert (tmp_path / "x").read_bytes() == b"short"


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, fails, before):
    if before is not None:
        (tmp_path / "x").write_bytes(before)
    monkeypatch.setattr(fails, failing)
    with pytest.raises(OSError, match="No space left on device"):
        write_bytes(tmp_path / "x", b"new")
    assert names(tmp_path) == ([] if before is None else ["x"])
    if before is not None:
        assert (tmp_path / "x").read_bytes() == before


def test_the_content_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file"
        events.append(f"sync {kind}")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"content"
        events.append("rename")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to tell a folder's handle from a file's")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_bytes(tmp_path / "x", b"content")
    assert events == ["sync file", "rename", "sync folder"]


def test_what_a_killed_writer_left_behind_is_no_hindrance(tmp_path):
    (tmp_path / f".x.{os.getpid()}.tmp").write_bytes(b"half of something much longer")
    write_bytes(tmp_path / "x", b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert names(tmp_path) == ["x"]


def test_json_is_read_back_and_pleasant_to_diff(tmp_path):
    value = {"θ": [0.1, 1e-300, None, True], "name": "zwölf"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == value
    assert "θ" in text and text.endswith("}\n") and text.count("\n") > 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b'{"step": 1', "cannot be read"),
        (b'{"step": "\xff"}', "cannot be read"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_damaged_json_is_refused(tmp_path, content, reason):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path / 'x.json'}: {reason}")


def test_missing_json_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.json: cannot be read .*No such file"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("kept", [0, 7, 20, -1])
def test_cut_tensors_are_refused(tmp_path, kept):
    whole = save({"a": torch.arange(10.0)})
    (tmp_path / "x.safetensors").write_bytes(whole)
    assert read_tensors(tmp_path / "x.safetensors")["a"].equal(torch.arange(10.0))
    (tmp_path / "x.safetensors").write_bytes(whole[:kept])
    with pytest.raises(UserError, match=r"x\.safetensors: damaged or not safetensors"):
        read_tensors(tmp_path / "x.safetensors")


def test_missing_tensors_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.safetensors: damaged or not safetensors .*No such file"):
        read_tensors(tmp_path / "x.safetensors")


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert checksum(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_sync_directory_closes_its_handle_even_when_it_fails(tmp_path, monkeypatch):
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *given: opened.append(real_open(*given)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or real_close(handle))
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        sync_directory(tmp_path)
    assert len(opened) == 1 and closed == opened


def test_json_floats_come_back_to_the_last_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, 2.0**53 + 2]
    write_json(tmp_path / "x.json", {"values": values})
    assert read_json(tmp_path / "x.json")["values"] == values
    assert json.loads((tmp_path / "x.json").read_text())["values"] == values


@pytest.mark.parametrize("new", [new_file, new_directory])
def test_what_is_new_appears_whole_or_not_at_all(new, tmp_path):
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
