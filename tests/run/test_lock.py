"""One process at a time in a run directory, and nobody is fooled by what a dead one left."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgprune_cli.errors import UserError
from pgprune_cli.run import lock
from pgprune_cli.run.layout import LOCK_FILE
from pgprune_cli.run.lock import locked
from pgprune_cli.storage import atomic

HOLD = "import sys, pathlib; from pgprune_cli.run.lock import locked\n"
HOLD += "with locked(pathlib.Path(sys.argv[1])): print(); input()"


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process, which is in `tmp_path / "run"`."""
    program = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "\n"
        yield process
        process.kill()


def refusal(run: Path) -> str:
    with pytest.raises(UserError) as error, locked(run):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_second_process_is_refused_and_told_who_is_in(owner, tmp_path) -> None:
    said = refusal(tmp_path / "run")
    assert said.startswith(f"{tmp_path / 'run'}: in use by process {owner.pid} on {socket.gethostname()} since 20")
    assert said.endswith("; wait for it or stop it, or choose another run directory")
    owner.communicate("\n")
    with locked(tmp_path / "run"):
        pass


def test_what_a_killed_owner_left_is_no_lock(owner, tmp_path) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == owner.pid
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_process_of_the_dead_owners_number_is_not_the_owner(tmp_path) -> None:
    """This very process lives, and so does the first one of the machine; neither has the lock."""
    for number in (os.getpid(), os.getppid(), 1):
        (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": number, "host": socket.gethostname(), "since": "now"}))
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_an_owner_that_has_not_signed_is_another_process(owner, tmp_path, text) -> None:
    (tmp_path / "run" / LOCK_FILE).write_text(text)
    assert "in use by another process;" in refusal(tmp_path / "run")


def test_it_leaves_nothing_behind(tmp_path) -> None:
    with locked(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK_FILE).exists()
    assert not (tmp_path / "new" / "run").exists()
    with locked(tmp_path / "kept"):
        (tmp_path / "kept" / "file").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_a_lock_whose_owner_takes_it_along_is_asked_for_again(tmp_path, monkeypatch) -> None:
    """Between opening the file and locking it, the owner may end and remove it."""
    take, calls = atomic.take, []

    def late(handle: int) -> bool:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(handle)
        return take(handle)

    monkeypatch.setattr(lock, "take", late)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys, number) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    with locked(tmp_path):
        pass
    atomic.write_bytes(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    assert capsys.readouterr().err == (f"pgprune: {tmp_path}: no locks on this file system; let no second process in\n")


@pytest.mark.parametrize("new", [atomic.new_file, atomic.new_directory])
def test_what_killed_writers_left_goes_and_what_living_ones_write_stays(new, tmp_path) -> None:
    out = tmp_path / "out[1]"
    (tmp_path / f".{out.name}.1.tmp").mkdir()
    (tmp_path / f".{out.name}.1.tmp" / "half").write_bytes(b"of a model")
    (tmp_path / f".{out.name}.2.tmp").write_bytes(b"half")
    (tmp_path / ".other.2.tmp").write_bytes(b"not ours")
    living = tmp_path / f".{out.name}.3.tmp"
    living.write_bytes(b"half")
    handle = os.open(living, os.O_RDWR)
    assert atomic.take(handle)
    with new(out) as temporary:
        (temporary / "x" if new is atomic.new_directory else temporary).write_bytes(b"whole")
    os.close(handle)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, ".other.2.tmp", living.name}
