"""Imports the programs of `scripts/`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def script_module(name: str) -> ModuleType:
    """Return `scripts/<name>.py` as a module."""
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
