"""What of a command's work is on disk once it was stopped, in words.

By the names of files alone: a signal may come while heavy packages are being imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pgprune_cli.run.layout import CHECKPOINTS_FOLDER, DECISION_RECORD, MEASURED_FILE, SCORES_FILE, WIDTHS_FOLDER


class Saved(NamedTuple):
    """text: what is saved, and where; done: whether the same command has nothing left to do."""

    text: str
    done: bool = False


NOTHING = Saved("nothing is saved yet")


def of_scores(run: Path) -> Saved:
    """Of `init-scores`, whose one file may also be an earlier call's."""
    return Saved(f"the scores in {run} are whole") if (run / SCORES_FILE).exists() else NOTHING


def of_search(run: Path, steps: int, step: int | None = None) -> Saved:
    """Of a search of so many `steps`; `step`: the one that is saved, where the caller knows it better than the disk."""
    if (run / DECISION_RECORD).exists():
        return Saved(f"the decision is saved in {run}")
    step = step or _newest_step(run)
    if step is not None:
        return Saved(f"step {step} of {steps} is saved in {run}")
    widths = len(list((run / WIDTHS_FOLDER).glob("layer-*.safetensors")))
    if widths:
        layers = "layer" if widths == 1 else "layers"
        return Saved(f"the scores and the widths of {widths} {layers} are saved in {run}")
    return (
        Saved(f"the scores are saved in {run}, of the search nothing yet") if (run / SCORES_FILE).exists() else NOTHING
    )


def of_comparison(out: Path, runs: Sequence[tuple[Path, int]]) -> Saved:
    """Of a comparison in `out`: how many of its `runs`, each with the steps of its search, are measured."""
    measured = sum((run / MEASURED_FILE).exists() for run, _ in runs)
    text = f"{measured} of {len(runs)} {'run is' if len(runs) == 1 else 'runs are'} measured in {out}"
    for run, steps in runs:
        step = None if (run / DECISION_RECORD).exists() else _newest_step(run)
        if step is not None:
            text += f", and step {step} of {steps} of {run.relative_to(out)} is saved"
    return Saved(text)


def of_export(out: Path, push: str | None = None) -> Saved:
    """Of an export to `out`, which is whole or absent, and its upload to the repository `push`."""
    if not out.exists():
        return Saved(f"nothing is written to {out}")
    return Saved(f"{out} is written whole" + (f"; to upload it: hf upload {push} {out}" if push else ""), done=True)


def _newest_step(run: Path) -> int | None:
    """Of the checkpoints, each a folder that is whole or not there."""
    names = (folder.name.removeprefix("step-") for folder in (run / CHECKPOINTS_FOLDER).glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)
