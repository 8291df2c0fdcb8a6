"""`provenance.jsonl`: the commands that wrote into a run, with their versions and machines."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pgprune_cli import __version__
from pgprune_cli.console.commands import command_line
from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import PROVENANCE_FILE
from pgprune_cli.storage.rows import append_line

PACKAGES = ("torch", "transformers", "safetensors", "datasets", "accelerate", "lm_eval")
"""The packages whose version can change a result."""


KEYS = {"command": str, "began": str, "versions": dict, "machine": dict}
"""What every line holds."""


def record_command(run: Path) -> None:
    """Append this process to the provenance: its command line, versions, machine, and when it `began` (UTC).

    Raises OSError.
    """
    append_line(run / PROVENANCE_FILE, json.dumps(_this_process()))


def read_provenance(run: Path) -> list[dict[str, Any]]:
    """Return the recorded commands, oldest first, without damaged lines. A missing file gives an empty list."""
    path = run / PROVENANCE_FILE
    commands = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            command = json.loads(line)
        except (ValueError, RecursionError):  # truncated by a full disk or a crash; the search does not need it
            continue
        if isinstance(command, dict) and all(isinstance(command.get(key), kind) for key, kind in KEYS.items()):
            commands.append(command)
    return commands


def required_provenance(run: Path) -> list[dict[str, Any]]:
    """Return the recorded commands as `read_provenance` does. Raises UserError if there are none."""
    if not (commands := read_provenance(run)):
        raise UserError(f"{run}: damaged, {PROVENANCE_FILE} is missing or holds no command.")
    return commands


def _this_process() -> dict[str, Any]:
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    began = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
    return {
        "command": _command(),
        "began": began.isoformat(timespec="seconds"),
        "versions": {"pgprune": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
    }


def _command() -> str:
    program = Path(sys.argv[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return command_line(*words, *sys.argv[1:])


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    """Return the name of the processor. On Linux only /proc/cpuinfo has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
