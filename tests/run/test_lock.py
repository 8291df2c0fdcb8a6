"""Only one process at a time works in a run directory, and leftovers of killed processes do no harm."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.messages import says

from pgprune_cli.errors import UserError
from pgprune_cli.export.plan import check_new
from pgprune_cli.recipe.strict_yaml import one_line
from pgprune_cli.run import lock
from pgprune_cli.run.layout import LOCK_FILE
from pgprune_cli.run.lock import locked, refuse_unusable, refuse_unwritable
from pgprune_cli.storage import atomic

HOLD = "import sys, pathlib; from pgprune_cli.run.lock import locked\n"
HOLD += "with locked(pathlib.Path(sys.argv[1])): print(); input()"


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Yield another process, which holds the lock of `tmp_path / "run"`."""
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


def test_lock_refuses_a_second_process_and_names_the_owner(owner, tmp_path) -> None:
    message = refusal(tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'run'}: in use by process {owner.pid} on {socket.gethostname()} since 20")
    owner.communicate("\n")
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("refuse", [refuse_unusable, refuse_unwritable, partial(check_new, directory=True)])
def test_a_path_that_is_not_utf_8_is_refused(refuse, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        refuse(Path("runs/\udcff"))
    says(one_line(str(error.value)), "runs/", "UTF-8", "--out")
    with pytest.raises(UserError, match="UTF-8"), locked(tmp_path / "\udcff"):
        pass
    refuse(tmp_path / "ä\u2028b")


def test_lock_is_free_when_its_owner_was_killed(owner, tmp_path) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == owner.pid
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_lock_is_free_when_another_process_has_the_id_of_a_dead_owner(tmp_path) -> None:
    """These processes are alive, but none of them holds the lock."""
    for number in (os.getpid(), os.getppid(), 1):
        (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": number, "host": socket.gethostname(), "since": "now"}))
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_lock_names_no_owner_when_its_file_is_unreadable(owner, tmp_path, text) -> None:
    (tmp_path / "run" / LOCK_FILE).write_text(text)
    says(refusal(tmp_path / "run"), f"{tmp_path / 'run'}: ", "another process")


def test_lock_leaves_nothing_behind(tmp_path) -> None:
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


def test_lock_file_left_by_a_killed_process_can_be_taken_by_the_group(tmp_path) -> None:
    before = os.umask(0o007)
    try:
        with locked(tmp_path / "run"):
            assert stat.S_IMODE((tmp_path / "run" / LOCK_FILE).stat().st_mode) == 0o660
    finally:
        os.umask(before)


def test_lock_is_taken_again_when_its_owner_removes_the_file(tmp_path, monkeypatch) -> None:
    """The owner may end and remove the file between opening and locking it."""
    try_lock, calls = atomic.try_lock, []

    def late(handle: int) -> bool:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(handle)
        return try_lock(handle)

    monkeypatch.setattr(lock, "try_lock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_lock_warns_and_continues_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    with locked(tmp_path):
        pass
    atomic.write_bytes(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    says(capsys.readouterr().err, f"pgprune: {tmp_path}: ", "no locks")


@pytest.mark.parametrize("new", [atomic.new_file, atomic.new_directory])
def test_new_file_removes_the_leftovers_of_killed_writers_only(new, tmp_path) -> None:
    out = tmp_path / "out[1]"
    (tmp_path / f".{out.name}.1.tmp").mkdir()
    (tmp_path / f".{out.name}.1.tmp" / "half").write_bytes(b"of a model")
    (tmp_path / f".{out.name}.2.tmp").write_bytes(b"half")
    (tmp_path / ".other.2.tmp").write_bytes(b"another file")
    living = tmp_path / f".{out.name}.3.tmp"
    living.write_bytes(b"half")
    handle = os.open(living, os.O_RDWR)
    assert atomic.try_lock(handle)
    with new(out) as temporary:
        (temporary / "x" if new is atomic.new_directory else temporary).write_bytes(b"whole")
    os.close(handle)
    assert {path.name for path in tmp_path.iterdir()} == {out.name, ".other.2.tmp", living.name}
