"""A tiny model, its text and recipe; commands on it in processes of their own; and what must come out of them."""

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
search: {{policy: units, forward_passes: 10, masks_per_step: 2, checkpoint_every: 1, evaluate_every: 5, learning_rate: 0.05}}
repair: {{method: least-squares, windows: 4}}
evaluation: {{corpora: [{base}/text.txt], seqlen: [16]}}
"""
CLOCKS = ("seconds", "tokens_per_second", "memory_bytes", "history_bytes", "history_sha256", "sha256")
"""Keys of records that a clock or the machine decides, or their length; all else must come out the same."""

JOBS = {
    "init-scores": [["init-scores", "{base}/recipe.yaml", "--out", "run"]],
    "search": [["search", "{base}/recipe.yaml", "--out", "run"]],
    "widths": [["search", "{base}/recipe.yaml", "--out", "run", "--set", "search.policy=widths"]],
    "export": [["search", "{base}/recipe.yaml", "--out", "run"], ["export", "run", "--out", "small"]],
    "compare": [["compare", "{base}/recipe.yaml", "--out", "table", "--only", "metric-start", "--max-windows", "2"]],
}
"""The last command of each is put to the test, the others lead there."""


@dataclass
class Ended:
    """A command that ended: its exit code (−9: killed), its seconds, what it said on stderr."""

    code: int
    seconds: float
    said: str


class Bench:
    """Commands in processes of their own, in folders of their own."""

    def __init__(self, base: Path, folders: Path) -> None:
        self.base, self.folders, self.number = base, folders, 0
        program = [sys.executable, str(Path(__file__).parent / "zygote.py")]
        self.zygote = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.undisturbed: dict[str, Undisturbed] = {}
        self.prepared: dict[str, Path] = {}

    def run(self, folder: Path, command: list[str], **request: Any) -> Ended:
        """Runs it in `folder`, with what `zygote.py` understands."""
        arguments = [word.format(base=self.base) for word in command]
        request |= {"folder": str(folder), "arguments": arguments}
        print(json.dumps(request), file=self.zygote.stdin, flush=True)
        answer = json.loads(self.zygote.stdout.readline())
        return Ended(answer["code"], answer["seconds"], Path(f"{folder}.stderr").read_text())

    def close(self) -> None:
        self.zygote.stdin.close()
        self.zygote.wait(timeout=60)
        self.zygote.stdout.close()

    def folder(self, job: str) -> Path:
        """A new one, where all commands before the last have been run."""
        self.number += 1
        folder = self.folders / f"{job}-{self.number}"
        if job not in self.prepared:
            self.prepared[job] = self.folders / f"{job}-prepared"
            self.prepared[job].mkdir()
            for command in JOBS[job][:-1]:
                ended = self.run(self.prepared[job], command)
                assert ended.code == 0, ended.said
        shutil.copytree(self.prepared[job], folder)
        return folder

    def of(self, job: str) -> Undisturbed:
        """What the job does and leaves when nothing goes wrong."""
        if job not in self.undisturbed:
            folder, points = self.folder(job), self.folders / f"{job}.points"
            ended = self.run(folder, JOBS[job][-1], points=str(points))
            assert ended.code == 0, ended.said
            self.undisturbed[job] = Undisturbed(json.loads(points.read_text()), ended.seconds, outcome(folder))
            shutil.rmtree(folder)
        return self.undisturbed[job]

    def ends_as_if_undisturbed(self, job: str, folder: Path) -> None:
        """Runs the job again, as its user would, and holds what it leaves against an undisturbed one's."""
        if job == "export" and (folder / "small").exists():  # whole, or this would not be its name
            assert outcome(folder) == self.of(job).left
            return
        ended = self.run(folder, JOBS[job][-1])
        assert ended.code == 0, ended.said
        assert outcome(folder) == self.of(job).left
        shutil.rmtree(folder)


@dataclass
class Undisturbed:
    """points: changes to the file system in order, [event, path] or [event, path, new path]; left: see `outcome`."""

    points: list[list[str]]
    seconds: float
    left: dict[str, Any] = field(repr=False)


def outcome(folder: Path) -> dict[str, Any]:
    """Every file below `folder`: its digest, or what its records say without the clocks."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name == ".lock":  # of one killed in its last moment, which holds nothing
            continue
        if path.suffix == ".md" and path.parent.name == "table":
            found[name] = "with seconds"
        elif path.name == PROVENANCE_FILE:
            found[name] = "tells of every process that was there"
        elif path.suffix in (".json", ".jsonl"):
            found[name] = [without_clocks(json.loads(text)) for text in texts(path)]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def texts(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(inner) for key, inner in value.items() if key not in CLOCKS}
    return [without_clocks(inner) for inner in value] if isinstance(value, list) else value
