"""Check the machine for `pgprune doctor`: Python, packages, devices, memory, disks and access to the hub.

Packages are imported inside the functions, so that a broken one is reported as a finding instead of crashing the
command.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pgprune_cli.storage.paths import cache_directory

Status = Literal["OK", "WARN", "FAIL"]

MIN_FREE_DISK = 2 * 10**9
"""Bytes. A small model's run and its export need about this much."""

DEVELOPER_EXTRAS = ("dev", "serving-tests")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    name: what was checked; status: FAIL if a search would fail, WARN if only another command would; state: what the
    machine has; fix: what to do, "" if the status is OK.
    """

    name: str
    status: Status
    state: str
    fix: str = ""

    @property
    def fails(self) -> bool:
        """Return whether a search would fail because of this."""
        return self.status == "FAIL"

    def text(self) -> str:
        """Return the finding as `pgprune doctor` prints it."""
        line = f"{self.status:<5}{self.name:<10}{self.state}"
        return f"{line}\n{'':<15}→ {self.fix}" if self.fix else line


def finding(name: str, state: str, fix: str = "") -> Finding:
    """Return a finding that is OK if there is nothing to fix and FAIL otherwise."""
    return Finding(name, "FAIL" if fix else "OK", state, fix)


def machine_findings(run: Path, downloads: bool = False) -> list[Finding]:
    """Check everything that does not depend on a recipe's settings.

    run: the run directory, or where there will be one; downloads: whether the model must be downloaded.
    """
    return [_python(), *_packages(), *_torch(), *_disks(run, downloads), _hub()]


def _python() -> Finding:
    state = f"{platform.python_version()}, {sys.executable}"
    return finding("python", state, "" if sys.version_info >= (3, 11) else "Install Python 3.11 or later.")


def _packages() -> Iterator[Finding]:
    """Check the packages that every command needs, and those that only some need."""
    try:
        unmet = _unmet_requirements("")
        yield finding("packages", "; ".join(unmet) or "all installed", "Run: pip install pgprune" if unmet else "")
        yield _extras()
    except metadata.PackageNotFoundError:
        state = "pgprune is not installed (it runs from a source tree), so its requirements cannot be checked"
        yield finding("packages", state, "Run: pip install -e .")


def _extras() -> Finding:
    """List the optional dependencies. A missing one is never a failure: no command needs all of them."""
    extras = metadata.metadata("pgprune").get_all("Provides-Extra") or []
    extras = [extra for extra in extras if extra not in DEVELOPER_EXTRAS]
    missing = [extra for extra in extras if _unmet_requirements(extra)]
    installed = ", ".join(extra for extra in extras if extra not in missing) or "none"
    hint = f"; not installed: {', '.join(missing)} (pip install 'pgprune[{missing[0]}]')" if missing else ""
    return finding("extras", installed + hint)


def _unmet_requirements(extra: str) -> list[str]:
    """Return the requirements of an extra, or of pgprune itself for "", that are missing or too old."""
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, metadata.requires("pgprune") or []):
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        if not extra or marker is not None:
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = ""
            if not version or not requirement.specifier.contains(version, prereleases=True):
                installed = f"{version} is installed" if version else "is not installed"
                unmet.append(f"{requirement.name} {installed}, but {requirement.specifier} is required")
    return unmet


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # missing libraries, an unsupported CPU, ...
        reason = " ".join(str(error).split())[:200]
        yield finding("torch", f"cannot be imported ({reason})", "Run: pip install --force-reinstall torch")
        return
    from pgprune_cli.model.devices import unusable_gpu

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield finding(f"cuda:{index}", f"{name}, {gigabytes(free)} of {gigabytes(total)} free")
    elif unusable := unusable_gpu():
        state, _, fix = unusable.partition(". ")
        yield Finding("cuda", "WARN", state, fix)
    yield finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield finding("memory", f"{gigabytes(free_memory('cpu'))} free")


def _disks(run: Path, downloads: bool) -> Iterator[Finding]:
    """Check the disk of the run directory, and those of the caches, which a search can do without."""
    from huggingface_hub.constants import HF_HUB_CACHE

    hub, tokens = Path(HF_HUB_CACHE), cache_directory()
    elsewhere = "Set HF_HOME or PGPRUNE_CACHE to another directory."
    for content, directory, needed, advice in (
        ("runs", run, True, "Choose another directory with --out, or set PGPRUNE_RUNS."),
        ("the hub cache", hub, downloads, elsewhere),
        ("tokens", tokens, False, elsewhere),
    ):
        existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        fix = ""
        if not os.access(existing, os.W_OK):
            fix = f"{existing} is not writable. {advice}"
        elif free < MIN_FREE_DISK:
            fix = f"Make room on the disk that holds {existing}."
        state = f"{gigabytes(free)} free for {content} ({directory})"
        yield finding("disk", state, fix) if needed or not fix else Finding("disk", "WARN", state, fix)


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return finding("hub", "offline (HF_HUB_OFFLINE is set): only cached and local files can be used")
    if get_token():
        return finding("hub", "logged in")
    return finding("hub", "not logged in (gated models need it: hf auth login)")


def free_memory(device: str) -> int:
    """Return the free bytes on a device."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def gigabytes(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:,.1f} GB"
