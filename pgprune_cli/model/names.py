"""What a model is called: `demo`, a path on this machine, or a name on the hub (owner/name)."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

from pgprune_cli.storage.paths import expanded

DEMO = "demo"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LOCAL_FOLDERS = ("models/", "runs/")
"""What pgprune's own folders begin with. No hub name does."""
WEIGHT_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def is_hub_name(name: str) -> bool:
    """Return whether `name` can be a name on the hub. A relative path can have the same form."""
    return bool(HUB_NAME.fullmatch(name)) and not name.startswith(LOCAL_FOLDERS) and not name.endswith(WEIGHT_FILES)


def absolute_name(name: str) -> str:
    """Return the name that stands for the same model in every working directory: a local model's absolute path.

    Links are kept, because the user chose them, unless the path climbs over one with `..`.
    """
    path = expanded(name)
    if name == DEMO or not path.exists():
        return name
    return str(path.resolve() if ".." in path.parts else path.absolute())


def is_absolute(name: str) -> bool:
    """Return whether a name is an absolute path, of whatever system the path is."""
    return PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()


def short_name(name: str) -> str:
    """Return the last part of a hub name or a path, of whatever system the path is."""
    return PureWindowsPath(name).name
