"""Trackers for `--tracker NAME` of `pgprune search` and `recover`: TensorBoard, Trackio and Weights & Biases.

Each gets the same metrics at the same steps. Everything else (where its data go, which account) is configured through
the tracker's own environment variables.
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
from pgprune_cli.run.layout import TENSORBOARD_FOLDER
from pgprune_cli.run.provenance import read_provenance

TrackerName = Literal["tensorboard", "trackio", "wandb"]

MODULES: Mapping[TrackerName, str] = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}
"""The module of each tracker. The extra of pgprune that installs it has the tracker's name."""

PROJECT = "pgprune"


class Tracked(Protocol):
    """A row of a history."""

    @property
    def step(self) -> int: ...

    def metrics(self) -> dict[str, float]: ...


class Tracker(Protocol):
    """Somewhere to log metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_installed(name: TrackerName) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    if find_spec(MODULES[name]) is None:
        raise UserError(f"--tracker {name}: needs {MODULES[name]}. Install it with: pip install 'pgprune[{name}]'")


@contextmanager
def tracking(
    name: TrackerName | None, run: Path, config: Mapping[str, Any], done: int
) -> Iterator[Callable[[Tracked], None]]:
    """Yield a function that logs a history row; without a tracker it does nothing.

    config: the recipe, as the tracker shows it; done: steps that are done already, if the run is resumed. Raises
    UserError for a tracker that is not installed or cannot start.
    """
    if name is None:
        yield lambda row: None
        return
    check_installed(name)
    with redirect_stdout(sys.stderr):  # trackers print greetings, and stdout is for results
        try:
            tracker = TRACKERS[name](run, config, done)
        except Exception as error:  # no account, no network, no disk: each tracker has its own errors
            raise UserError(f"--tracker {name}: {' '.join(str(error).split())}") from error
    try:
        yield lambda row: tracker.log(row.metrics(), row.step)
    finally:
        with redirect_stdout(sys.stderr):
            tracker.close()


class TensorBoard:
    """Event files in the run directory: `tensorboard --logdir runs`."""

    def __init__(self, run: Path, config: Mapping[str, Any], done: int) -> None:
        writer = import_module(MODULES["tensorboard"]).SummaryWriter
        # Steps after the last checkpoint are repeated; file names have a resolution of one second.
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
        # A resumed run continues its tracked run; a new directory of the same name starts another one.
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
