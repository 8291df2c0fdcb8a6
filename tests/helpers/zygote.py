"""Runs pgprune commands, each in a forked process that may meet faults, so that packages are imported only once.

A request is a line of JSON on stdin, its answer a line of JSON on stdout. A request holds:

    arguments, folder   the command and where it runs; its output goes to FOLDER.stdout and FOLDER.stderr
    changes             a file that gets the list of all changes to the file system below the folder
    fault               {"at": N, "kind": KIND}: the N-th change meets a fault. KIND is `kill` (SIGKILL just before the
                        change), the name of a signal, or the name of an error, with which it and all later changes fail
    file_size_limit     the most bytes of one file: a write that exceeds them fails half-way
    kill_at_limit       whether that write kills the process instead
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename": (0, 2), "os.mkdir": (0, 2), "os.truncate": (0, None)}
REMOVALS = {"os.remove": (0, 1), "os.rmdir": (0, 1)}
"""Audit events, and the positions in their arguments of the path and of its directory's file descriptor."""
NO_REMOVALS_EITHER = ("EROFS", "EACCES")
"""Errors that prevent removing files, too."""


def path_of(descriptor: int) -> str:
    """Return the path that a file descriptor was opened with."""
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115


class Faults:
    """Counts the changes below `folder`. The change number `at` meets the fault `kind`; if 0, none does."""

    def __init__(self, folder: str, at: int = 0, kind: str = "") -> None:
        self.folder = os.path.realpath(folder)
        self.at, self.kind = at, kind
        self.count = 0
        self.changes: list[list[str]] = []

    def install(self) -> None:
        """Watch this process from now on."""
        fsync = os.fsync

        def watched_fsync(descriptor: int) -> None:
            self.change("fsync", path_of(descriptor))
            fsync(descriptor)

        os.fsync = watched_fsync  # which raises no audit event
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an audit event of Python, and count it if it changes the file system."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and not isinstance(path, int):
                self.change(event, os.fsdecode(path))
        elif positions := (CHANGES | REMOVALS).get(event):
            path, directory = arguments[positions[0]], arguments[positions[1]] if positions[1] is not None else -1
            if not isinstance(path, int):
                parent = path_of(directory) if isinstance(directory, int) and directory >= 0 else ""
                new_path = os.fsdecode(arguments[1]) if event == "os.rename" else ""
                self.change(event, str(Path(parent) / os.fsdecode(path)), new_path)

    def change(self, event: str, path: str, new_path: str = "") -> None:
        """Count a change, and let the fault happen if it is due."""
        if not os.path.abspath(path).startswith(self.folder + os.sep):  # noqa: PTH100  (follows no links)
            return
        self.count += 1
        self.changes.append([event, *(os.path.relpath(name, self.folder) for name in (path, new_path) if name)])
        if not self.at or self.count < self.at:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind.startswith("SIG"):
            if self.count == self.at:
                os.kill(os.getpid(), getattr(signal, self.kind))
            return
        if event not in REMOVALS or self.kind in NO_REMOVALS_EITHER:
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number), *([path] if event != "fsync" else []))


def run_child(request: dict[str, Any]) -> NoReturn:
    """Run the command of a request in this process and end it."""
    code = 70
    try:
        os.chdir(request["folder"])
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{request['folder']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        if "file_size_limit" in request:
            limit_file_size(request["file_size_limit"], request.get("kill_at_limit", False))
        faults = Faults(request["folder"], **request.get("fault", {}))
        faults.install()
        code = exit_code_of(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        faults.at = 0
        if "changes" in request:
            Path(request["changes"]).write_text(json.dumps(faults.changes))
    finally:
        os._exit(code)


def limit_file_size(size: int, kill: bool) -> None:
    """Let a write beyond `size` bytes of a file fail (Python ignores the kernel's SIGXFSZ), or kill this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if kill:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def exit_code_of(arguments: list[str]) -> int:
    """Run pgprune with these arguments and return its exit code."""
    import traceback

    from pgprune_cli.cli import program

    sys.argv = ["pgprune", *arguments]
    try:
        program.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            run_child(request)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    import transformers.convert_slow_tokenizer
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pgprune_cli.cli.program
    import pgprune_cli.jobs.compare
    import pgprune_cli.jobs.export  # noqa: F401

    serve()
