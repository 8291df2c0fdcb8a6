"""Runs pgprune commands, each in a process of its own that may be killed or meet faults, without importing anew.

A request is a line of JSON on stdin, its answer a line on stdout. A request's `fault` strikes at the `at`-th change to
the file system below its folder: `kill` is SIGKILL, a signal's name is that signal, an error's name makes that change
and all that follow fail.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename": (0, 2), "os.mkdir": (0, 2), "os.truncate": (0, None)}
REMOVALS = {"os.remove": (0, 1), "os.rmdir": (0, 1)}
"""Audit events, and where in their arguments the path and the handle of its directory are."""
HOPELESS = ("EROFS", "EACCES")
"""Errors that keep one from removing files, too."""


def target(handle: int) -> str:
    """What an open handle is of."""
    return os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115


class Faults:
    """Counts the changes below `folder`; at the one that is numbered `at`, and for errors from then on, `kind` happens.

    Slow: every fsync takes so many seconds.
    """

    def __init__(self, folder: str, at: int = 0, kind: str = "", slow: float = 0.0) -> None:
        self.folder = os.path.realpath(folder)
        self.at, self.kind, self.slow = at, kind, slow
        self.count = 0
        self.seen: list[list[str]] = []

    def install(self) -> None:
        fsync = os.fsync

        def watched(handle: int) -> None:
            time.sleep(self.slow)
            self.point("fsync", target(handle))
            fsync(handle)

        os.fsync = watched
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and not isinstance(path, int):
                self.point(event, os.fsdecode(path))
        elif place := (CHANGES | REMOVALS).get(event):
            path, folder = arguments[place[0]], arguments[place[1]] if place[1] is not None else -1
            if not isinstance(path, int):
                base = target(folder) if isinstance(folder, int) and folder >= 0 else ""
                to = os.fsdecode(arguments[1]) if event == "os.rename" else ""
                self.point(event, str(Path(base) / os.fsdecode(path)), to)

    def point(self, event: str, path: str, to: str = "") -> None:
        if not os.path.abspath(path).startswith(self.folder + os.sep):  # noqa: PTH100  (follows no links)
            return
        self.count += 1
        self.seen.append([event, *(os.path.relpath(name, self.folder) for name in (path, to) if name)])
        if not self.at or self.count < self.at:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind.startswith("SIG"):
            if self.count == self.at:
                os.kill(os.getpid(), getattr(signal, self.kind))
            return
        if event not in REMOVALS or self.kind in HOPELESS:
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number), *([path] if event != "fsync" else []))


def child(request: dict[str, Any]) -> NoReturn:
    """The command; never returns."""
    code = 70
    try:
        os.chdir(request["folder"])
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{request['folder']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        if "bytes" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["bytes"], request["bytes"]))
        faults = Faults(request["folder"], **request.get("fault", {}))
        faults.install()
        code = exit_code_of(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        faults.at = 0
        if request.get("points"):
            Path(request["points"]).write_text(json.dumps(faults.seen))
    finally:
        os._exit(code)


def exit_code_of(arguments: list[str]) -> int:
    import traceback

    from pgprune_cli.cli import program as cli

    sys.argv = ["pgprune", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def serve(answer: Callable[[dict[str, Any]], None]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        process = os.fork()
        if process == 0:
            child(request)
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            os.kill(process, signal.SIGKILL)  # a process that has ended is still there until it is waited for
        _, status = os.waitpid(process, 0)
        answer({"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began})


if __name__ == "__main__":
    import transformers.convert_slow_tokenizer
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pgprune_cli.cli.program
    import pgprune_cli.jobs.compare
    import pgprune_cli.jobs.export  # noqa: F401

    serve(lambda found: print(json.dumps(found), flush=True))
