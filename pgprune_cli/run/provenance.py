"""`provenance.jsonl` of a run: the commands that wrote there, with which versions, on which machine."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pgprune_cli import __version__
from pgprune_cli.run.layout import PROVENANCE_FILE

PACKAGES = ("torch", "transformers", "safetensors", "datasets", "accelerate", "lm_eval")
"""Those whose version can change a result."""


def note(run: Path) -> None:
    """Adds this process to the run's provenance: its command as it was given, versions, machine; `began` is UTC."""
    with (run / PROVENANCE_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_this_process(), ensure_ascii=False) + "\n")


def read_provenance(run: Path) -> list[dict[str, Any]]:
    """What was noted, oldest first; runs of before there was a provenance have none. A cut line is left out."""
    path = run / PROVENANCE_FILE
    notes = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            notes.append(json.loads(line))
        except ValueError:  # cut by a full disk or a lost machine: the search went on without it, and so does this
            continue
    return notes


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
    return shlex.join([*words, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Its name, which Linux says in a file of its own only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
