"""`pgprune search --tracker NAME`: the rows of the history, for TensorBoard, Trackio or Weights & Biases too.

Each gets the same metrics at the same steps. How a tracker is configured beyond that (where its data go, which account)
is between it and its own environment variables.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from pgprune_cli.errors import UserError
from pgprune_cli.run.history import Row
from pgprune_cli.run.layout import TENSORBOARD_FOLDER
from pgprune_cli.run.provenance import read_provenance

TrackerName = Literal["tensorboard", "trackio", "wandb"]

MODULES: Mapping[TrackerName, str] = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
"""What each is imported as; the extra of pgprune that installs it has the tracker's name."""

PROJECT = "pgprune"


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_installed(name: TrackerName) -> None:
    """Raises UserError for a tracker whose package is not there."""
    if find_spec(MODULES[name]) is None:
        raise UserError(f"--tracker {name} needs the extra: pip install 'pgprune[{name}]' ({MODULES[name]} is missing)")


@contextmanager
def tracking(
    name: TrackerName | None, run: Path, config: Mapping[str, Any], done: int
) -> Iterator[Callable[[Row], None]]:
    """Gives what is to be told every row; nothing happens without a name.

    config: the recipe, as the tracker shows it; done: steps of before, where a search goes on. Raises UserError for a
    tracker that is missing or will not begin.
    """
    if name is None:
        yield lambda row: None
        return
    check_installed(name)
    with redirect_stdout(sys.stderr):  # they greet, and stdout is for results
        try:
            tracker = TRACKERS[name](run, config, done)
        except Exception as error:  # no account, no network, no disk: each has errors of its own
            raise UserError(f"--tracker {name}: {' '.join(str(error).split())}") from error
    try:
        yield lambda row: tracker.log(metrics_of(row), row.step)
    finally:
        with redirect_stdout(sys.stderr):
            tracker.close()


def metrics_of(row: Row) -> dict[str, float]:
    """A row as numbers with names, those of the history: `loss` is the samples' mean, `kept/<family>` counts units."""
    numbers = {
        "loss": row.mean_loss,
        "heldout_loss": row.heldout_loss,
        "baseline": row.baseline,
        "learning_rate": row.learning_rate,
        "entropy": row.entropy,
        "skipped": row.skipped,
        "tokens_per_second": row.tokens_per_second,
        "memory_bytes": row.memory_bytes,
        "seconds": row.seconds,
    }
    kept = {f"kept/{family}": sum(widths) for family, widths in (row.kept or {}).items()}
    return {key: value for key, value in (numbers | kept).items() if value is not None}


class TensorBoard:
    """Event files in the run directory: `tensorboard --logdir runs`."""

    def __init__(self, run: Path, config: Mapping[str, Any], done: int) -> None:
        writer = import_module(MODULES["tensorboard"]).SummaryWriter
        # steps after the last checkpoint come again; a file's own name has the second only
        purge = done + 1 if done else None
        self.writer = writer(str(run / TENSORBOARD_FOLDER), purge_step=purge, filename_suffix=f".{done}")
        if not done:
            self.writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    def __init__(self, run: Path, config: Mapping[str, Any], done: int) -> None:
        self.module = import_module(MODULES["trackio"])
        resume = "allow" if done else "never"
        self.module.init(project=PROJECT, name=run.resolve().name, config=dict(config), resume=resume)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


class WeightsAndBiases:
    def __init__(self, run: Path, config: Mapping[str, Any], done: int) -> None:
        module = import_module(MODULES["wandb"])
        # the same run again where a search goes on, and another where its directory was made anew
        began = next((note["began"] for note in read_provenance(run)), "")
        identity = hashlib.sha256(f"{run.resolve()} {began}".encode()).hexdigest()[:16]
        self.run = module.init(
            project=PROJECT, name=run.resolve().name, config=dict(config), id=identity, resume="allow", dir=str(run)
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: Mapping[TrackerName, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}
