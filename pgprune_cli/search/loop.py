"""The loop of a search: steps, rows, checkpoints. It stops at any step, and goes on as if it never had."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from pgprune_cli.console.progress import Progress
from pgprune_cli.console.signals import stopping
from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from pgprune_cli.run.history import History, Row, Written, read_history
from pgprune_cli.run.resume import resumed
from pgprune_cli.search.problem import Problem
from pgprune_cli.search.progress import SearchProgress, memory_in_use
from pgprune_cli.search.trackers import TrackerName, tracking

BAD_STEPS = 10
"""After so many steps in a row without one finite loss, a search gives up."""


class Interrupted(Exception):  # noqa: N818  (a stop that was asked for is no error)
    """A signal asked the search to stop, and its state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum, step)
        self.signum = signum
        self.step = step


@dataclass
class Loop:
    """Where the search stands: what a checkpoint holds."""

    state: SearchState | WidthState
    data_position: int = 0
    bad_steps: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


def run_steps(
    problem: Problem,
    run: Path,
    identity: str,
    progress: Progress,
    skip_corrupt_checkpoint: bool,
    log: TrackerName | None,
) -> Loop:
    """The loop. Returns where it ended."""
    recipe, schedule, ranks = problem.recipe, problem.recipe.search, problem.ranks
    with ranks.writer_first():
        loop = _loop(
            problem, resumed(run, identity, skip_corrupt_checkpoint) if ranks.writer else latest_checkpoint(run)
        )
    units = {family.name: family.counts for family in problem.space.families}
    budget = f"{recipe.budget.sparsity:.0%} of {recipe.budget.measure} go"
    shown = SearchProgress(schedule.steps, units, budget, read_history(run) if ranks.writer else (), progress)
    tracked = tracking(log, run, asdict(recipe), loop.state.step)
    written = History(run) if ranks.writer else nullcontext()
    with tracked as track, shown as progress, written as history, _stop_signals(ranks) as stop:
        if loop.state.step:
            progress.say(f"going on from step {loop.state.step} of {schedule.steps}")
        while loop.state.step < schedule.steps:
            row = _one_step(problem, loop)
            track(row)
            progress.show(row)
            done = loop.state.step == schedule.steps
            stopped_by = ranks.greatest(stop[0] if stop else 0)
            if history:
                history.append(row)
                if stopped_by or done or loop.state.step % schedule.checkpoint_every == 0:
                    save_checkpoint(run, _checkpoint(loop, recipe, history.flush(), identity))
                    progress.saved(loop.state.step)
            if stopped_by:
                raise Interrupted(stopped_by, loop.state.step)
        if stopped_by := ranks.greatest(stop[0] if stop else 0):  # while the last checkpoint was written
            raise Interrupted(stopped_by, loop.state.step)
    return loop


def _one_step(problem: Problem, loop: Loop) -> Row:
    """Sample masks, hear their losses on the next batch, move the policy. Advances `loop`."""
    recipe, schedule, policy = problem.recipe, problem.recipe.search, problem.policy
    began = time.perf_counter()
    tokens = problem.batches.at(loop.data_position)
    state, draws, masks = policy.propose(loop.state, schedule.masks_per_step)
    losses = problem.losses(masks, tokens)
    rate = policy.rate(state)
    loop.state = policy.update(state, draws, losses)
    spent = time.perf_counter() - began

    loop.data_position += 1
    loop.forward_passes += len(masks)
    loop.bad_steps = 0 if losses.isfinite().any() else loop.bad_steps + 1
    if loop.bad_steps >= min(BAD_STEPS, schedule.steps):
        raise RunError(
            f"step {loop.state.step}: no finite loss in {loop.bad_steps} steps; the model overflows in {recipe.dtype}: "
            "try dtype float32 or bfloat16, or a lower sparsity"
        )
    step = loop.state.step
    due = step % schedule.evaluate_every == 0 or step in (1, schedule.steps)
    mask = policy.mask(loop.state) if due else None
    decided = None if mask is None else problem.keep(mask)
    return Row(
        step=step,
        losses=[finite(float(loss)) for loss in losses],
        baseline=loop.state.baseline if isinstance(loop.state, SearchState) else None,
        learning_rate=rate,
        entropy=policy.entropy(loop.state),
        heldout_loss=finite(problem.heldout_loss(decided, policy.outputs(decided))) if decided else None,
        skipped=loop.state.skipped,
        tokens_per_second=len(masks) * tokens.numel() / spent,
        memory_bytes=memory_in_use(),
        seconds=loop.elapsed(),
        kept=None if mask is None else problem.space.widths(mask),
    )


def finite(value: float) -> float | None:
    """None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _loop(problem: Problem, found: Checkpoint | None) -> Loop:
    """Where the search stands: at its beginning, or where a checkpoint was found."""
    if found is None:
        return Loop(problem.policy.begin(problem.recipe.seed))
    return Loop(found.state, found.data_position, found.bad_steps, found.forward_passes, found.seconds)


def _checkpoint(loop: Loop, recipe: Recipe, history: Written, identity: str) -> Checkpoint:
    schedule = (recipe.search.schedule, recipe.search.learning_rate, recipe.search.steps)
    return Checkpoint(
        loop.state,
        loop.data_position,
        schedule,
        loop.bad_steps,
        loop.forward_passes,
        loop.elapsed(),
        history,
        identity,
    )


@contextmanager
def _stop_signals(ranks: Ranks) -> Iterator[list[int]]:
    """A list that holds the signal once one asked to stop. A second one acts as if this were not here.

    Not so under torchrun, which passes on what its processes may have received already.
    """
    caught: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in stopping()}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def note(signum: int, _: FrameType | None) -> None:
        caught.append(signum)
        if ranks.world == 1:
            restore()

    for signum in before:
        signal.signal(signum, note)
    try:
        yield caught
    finally:
        restore()
