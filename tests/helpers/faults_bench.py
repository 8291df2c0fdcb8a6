"""Runs pgprune on a tiny model in processes of their own, with faults, and compares what they leave on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgprune_cli.run.layout import PROVENANCE_FILE

RECIPE = """\
model: {base}/model
dtype: float32
device: cpu
calibration: {{corpus: {base}/text.txt, windows: 16, seqlen: 16, batch: 2, heldout: 2}}
budget: {{sparsity: 0.4}}
scores: {{metric: wanda-sp, windows: 2, seqlen: 16}}
search:
  {{policy: units, forward_passes: 10, masks_per_step: 2, checkpoint_every: 1, evaluate_every: 5, learning_rate: 0.05}}
repair: {{method: least-squares, windows: 4}}
evaluation: {{corpora: [{base}/text.txt], seqlen: [16]}}
"""
VARYING_KEYS = ("seconds", "tokens_per_second", "memory_bytes", "history_bytes", "history_sha256", "sha256", "phases")
"""Keys of records that differ between equal runs: times, memory, and the sizes and checksums that depend on them."""

JOBS = {
    "init-scores": [["init-scores", "{base}/recipe.yaml", "--out", "run"]],
    "search": [["search", "{base}/recipe.yaml", "--out", "run"]],
    "widths": [["search", "{base}/recipe.yaml", "--out", "run", "--set", "search.policy=widths"]],
    "export": [["search", "{base}/recipe.yaml", "--out", "run"], ["export", "run", "--out", "small"]],
    "compare": [["compare", "{base}/recipe.yaml", "--out", "table", "--only", "metric-start", "--max-windows", "2"]],
}
"""The commands of each job. The last one is tested, the others prepare its folder."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended. code: its exit code, negative if a signal killed it; stderr: what it printed there."""

    code: int
    stderr: str


@dataclass(frozen=True)
class Undisturbed:
    """A job without faults.

    changes: what it does to the file system in order, each [event, path] or [event, path, new path]; contents: of the
    files that it leaves, see `contents_of`.
    """

    changes: list[list[str]]
    contents: dict[str, Any] = field(repr=False)


class Bench:
    """Runs commands in processes of their own, in folders of their own."""

    def __init__(self, base: Path, folders: Path) -> None:
        self.base, self.folders, self.number = base, folders, 0
        program = [sys.executable, str(Path(__file__).parent / "zygote.py")]
        self.zygote = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.undisturbed_jobs: dict[str, Undisturbed] = {}
        self.prepared: dict[str, Path] = {}

    def run(self, folder: Path, command: list[str], **request: Any) -> Ended:
        """Run a command in `folder`. request: what `zygote.py` understands."""
        request |= {"folder": str(folder), "arguments": self.arguments(command)}
        print(json.dumps(request), file=self.zygote.stdin, flush=True)
        code = json.loads(self.zygote.stdout.readline())["code"]
        return Ended(code, Path(f"{folder}.stderr").read_text())

    def arguments(self, command: list[str]) -> list[str]:
        """Return a command of JOBS with the paths of this bench."""
        return [word.format(base=self.base) for word in command]

    def close(self) -> None:
        """End the process that runs the commands."""
        self.zygote.stdin.close()
        self.zygote.wait(timeout=60)
        self.zygote.stdout.close()

    def folder(self, job: str) -> Path:
        """Return a new folder in which all commands of the job but the last have been run."""
        self.number += 1
        folder = self.folders / f"{job}-{self.number}"
        if job not in self.prepared:
            self.prepared[job] = self.folders / f"{job}-prepared"
            self.prepared[job].mkdir()
            for command in JOBS[job][:-1]:
                ended = self.run(self.prepared[job], command)
                assert ended.code == 0, ended.stderr
        shutil.copytree(self.prepared[job], folder)
        return folder

    def undisturbed(self, job: str) -> Undisturbed:
        """Return what the job does and leaves without faults. It runs once."""
        if job not in self.undisturbed_jobs:
            folder, changes = self.folder(job), self.folders / f"{job}.changes"
            ended = self.run(folder, JOBS[job][-1], changes=str(changes))
            assert ended.code == 0, ended.stderr
            self.undisturbed_jobs[job] = Undisturbed(json.loads(changes.read_text()), contents_of(folder))
            shutil.rmtree(folder)
        return self.undisturbed_jobs[job]

    def assert_repeating_completes(self, job: str, folder: Path) -> None:
        """Run the job again as its user would. Fails unless it leaves what an undisturbed one leaves."""
        if job == "export" and (folder / "small").exists():  # an export is complete or absent
            assert contents_of(folder) == self.undisturbed(job).contents
            return
        ended = self.run(folder, JOBS[job][-1])
        assert ended.code == 0, ended.stderr
        assert contents_of(folder) == self.undisturbed(job).contents
        shutil.rmtree(folder)


def contents_of(folder: Path) -> dict[str, Any]:
    """Return the contents of every file below `folder` by path: its digest, or its records without VARYING_KEYS."""
    contents: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name == ".lock":  # a killed process leaves its lock file, which locks nothing
            continue
        if path.suffix == ".md" and path.parent.name == "table":
            contents[name] = "names seconds, which vary"
        elif path.name == PROVENANCE_FILE:
            contents[name] = "lists every process that ran, so it varies"
        elif path.suffix in (".json", ".jsonl"):
            contents[name] = [without_varying_keys(json.loads(record)) for record in records_in(path)]
        else:
            contents[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return contents


def records_in(path: Path) -> list[str]:
    """Return the JSON records of a file as text: its lines, or all of it."""
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def without_varying_keys(value: Any) -> Any:
    """Return a JSON value without VARYING_KEYS at any depth."""
    if isinstance(value, dict):
        return {key: without_varying_keys(inner) for key, inner in value.items() if key not in VARYING_KEYS}
    return [without_varying_keys(inner) for inner in value] if isinstance(value, list) else value
