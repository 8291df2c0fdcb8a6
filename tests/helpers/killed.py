"""A recovery in a process that is killed in the middle of it."""

from __future__ import annotations

import importlib
import os
import signal
from multiprocessing import get_context
from types import ModuleType
from typing import Any

from pgprune_cli.jobs.recover import recover
from pgprune_cli.jobs.recovery_request import Request


def killed_at(asked: Request, module: ModuleType, name: str, calls: int = 1) -> None:
    """Recover in a process that is killed in place of the given call of a function in a module.

    It is a new process: in a fork of one that has used torch, torch's threads are missing, and loading a model fails.
    """
    process = get_context("spawn").Process(target=_recover_until, args=(asked, module.__name__, name, calls))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _recover_until(asked: Request, module_name: str, name: str, calls: int) -> None:
    module = importlib.import_module(module_name)
    function, places = getattr(module, name), iter(range(1, calls + 1))

    def call(*arguments: Any) -> Any:
        if next(places) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    setattr(module, name, call)
    recover(asked)
