"""The loop of a search: steps, history rows and checkpoints. It can stop at any step, and resumes bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from pgprune_cli.console.progress import SILENT
from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.errors import RunError
from pgprune_cli.model.devices import memory_in_use
from pgprune_cli.run.checkpoint import Best, Checkpoint, latest_checkpoint, save_checkpoint
from pgprune_cli.run.history import History, Row, read_history
from pgprune_cli.run.interruption import Interrupted, stop_signals
from pgprune_cli.run.resume import resume
from pgprune_cli.run.trackers import TrackerName, tracking
from pgprune_cli.search.objective import HeldOut
from pgprune_cli.search.problem import Problem
from pgprune_cli.search.progress import SearchProgress
from pgprune_cli.storage.records import finite
from pgprune_cli.storage.rows import Written

BAD_STEPS = 10
"""A search gives up after this many steps in a row without a finite loss."""


@dataclass
class LoopState:
    """Where a search stands: what a checkpoint holds."""

    policy_state: SearchState | WidthState
    best: Best | None = None
    bad_steps: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.policy_state.step

    def elapsed(self) -> float:
        """Return the seconds of search so far, over all starts."""
        return self.seconds + time.monotonic() - self.started


def run_steps(
    problem: Problem,
    identity: str,
    *,
    skip_corrupt_checkpoint: bool = False,
    tracker: TrackerName | None = None,
) -> LoopState:
    """Run the steps that are left and return the final state.

    identity: digest of everything a checkpoint must agree with. Raises UserError for a checkpoint of another search,
    RunError if losses are never finite, Interrupted after a signal.
    """
    context, settings = problem.context, problem.context.recipe.search
    run, ranks = context.run, context.ranks
    with ranks.run_writer_first():
        checkpoint = resume(run, identity, skip_corrupt_checkpoint) if ranks.is_writer else latest_checkpoint(run)
    loop = _loop_state(problem, checkpoint)
    view = _view(problem)
    log = tracking(tracker if ranks.is_writer else None, run, asdict(context.recipe), loop.step)
    writer = History(run) if ranks.is_writer else nullcontext()
    with log as track, view, writer as history, stop_signals(ranks) as signals, problem.in_order():
        if loop.step:
            view.say(f"resuming from step {loop.step} of {settings.steps}")
        elif settings.evaluates(0):
            row = _finish_row(problem, loop)
            track(row)
            view.show(row)
            if history:
                history.append(row)
        while loop.step < settings.steps:
            row = _take_step(problem, loop)
            track(row)
            view.show(row)
            stop_signal = ranks.max(signals[0] if signals else 0)
            if history:
                history.append(row)
                due = loop.step == settings.steps or loop.step % settings.checkpoint_every == 0
                if stop_signal or due:
                    save_checkpoint(run, _checkpoint(loop, history.flush(), identity))
                    view.saved(loop.step)
            if stop_signal:
                raise Interrupted(stop_signal, loop.step)
        if stop_signal := ranks.max(signals[0] if signals else 0):  # it came while the last checkpoint was written
            raise Interrupted(stop_signal, loop.step)
    return loop


def _take_step(problem: Problem, loop: LoopState) -> Row:
    """Propose masks, compute their losses on the next batch, update the policy. Advances `loop`."""
    settings, policy = problem.context.recipe.search, problem.policy
    began = time.perf_counter()
    state, draws, masks = policy.propose(loop.policy_state, settings.masks_per_step)
    distinct, places = _distinct(masks)
    tokens = problem.objective.batches.at(loop.step)
    losses = problem.losses(distinct, loop.step)[places]
    rate = policy.rate(state)
    loop.policy_state = policy.update(state, draws, losses)
    spent = time.perf_counter() - began

    loop.bad_steps = 0 if losses.isfinite().any() else loop.bad_steps + 1
    _refuse_overflow(problem, loop)
    return _finish_row(
        problem,
        loop,
        losses=[finite(float(loss)) for loss in losses],
        learning_rate=rate,
        tokens_per_second=len(masks) * tokens.numel() / spent,
    )


def _distinct(masks: Tensor) -> tuple[Tensor, list[int]]:
    """Return each different one of some masks `(K, n)` once, in their order, and the place of every mask among them.

    Few masks differ if the budget holds in every layer or the model has few units.
    """
    first: dict[bytes, int] = {}
    places = [first.setdefault(mask.numpy().tobytes(), len(first)) for mask in masks]
    return masks[[places.index(place) for place in range(len(first))]], places


def _finish_row(
    problem: Problem,
    loop: LoopState,
    losses: Sequence[float | None] = (),
    learning_rate: float | None = None,
    tokens_per_second: float = 0.0,
) -> Row:
    """Evaluate the current decision if that is due, and return the row of the step just done or of the start."""
    due = problem.context.recipe.search.evaluates(loop.step)
    kept, heldout = _evaluate(problem, loop) if due else (None, None)
    state = loop.policy_state
    return Row(
        step=loop.step,
        losses=list(losses),
        baseline=state.baseline if isinstance(state, SearchState) else None,
        learning_rate=learning_rate,
        entropy=problem.policy.entropy(state),
        heldout_loss=None if heldout is None else finite(heldout.loss),
        skipped=state.skipped,
        tokens_per_second=tokens_per_second,
        memory_bytes=memory_in_use(),
        seconds=loop.elapsed(),
        kept=kept,
        bos=problem.context.text.bos is not None,
        heldout_objective=None if heldout is None else finite(heldout.objective),
    )


def _evaluate(problem: Problem, loop: LoopState) -> tuple[dict[str, list[int]], HeldOut]:
    """Evaluate the current decision on held-out text, and remember it in `loop` if it is the best so far.

    Returns what it keeps of every layer, by family, and what it costs.
    """
    policy = problem.policy
    centre = policy.centre(loop.policy_state)
    mask = policy.mask(centre)
    model_mask = problem.model_mask(mask)
    heldout = problem.objective.on_heldout(model_mask, policy.repaired(model_mask))
    lowest = math.inf if loop.best is None else loop.best.objective
    if heldout.objective < lowest:  # never for NaN
        loop.best = Best(loop.step, heldout.objective, centre)
    return problem.kept(mask), heldout


def _refuse_overflow(problem: Problem, loop: LoopState) -> None:
    """Raise RunError if no loss has been finite for too many steps."""
    recipe = problem.context.recipe
    if loop.bad_steps >= min(BAD_STEPS, recipe.search.steps):
        raise RunError(
            f"step {loop.step}: no finite loss in {loop.bad_steps} steps, so the model overflows in {recipe.dtype}. "
            "Try dtype float32 or bfloat16, or a lower sparsity."
        )


def _view(problem: Problem) -> SearchProgress:
    """Return what the user sees of the search. Only the writer shows it."""
    context = problem.context
    recipe, writer = context.recipe, context.ranks.is_writer
    elements = problem.kept(torch.ones(problem.space.n, dtype=torch.bool))
    budget = f"removing {recipe.budget.sparsity:.0%} of {recipe.budget.measure}"
    rows = read_history(context.run) if writer else ()
    progress = context.progress if writer else SILENT
    return SearchProgress(recipe.search.steps, elements, budget, rows, progress, recipe.search.objective)


def _loop_state(problem: Problem, checkpoint: Checkpoint | None) -> LoopState:
    """Return the state at a checkpoint, or at the beginning without one."""
    if checkpoint is None:
        return LoopState(problem.policy.begin(problem.context.recipe.seed))
    return LoopState(
        checkpoint.state,
        checkpoint.best,
        checkpoint.bad_steps,
        checkpoint.seconds,
    )


def _checkpoint(loop: LoopState, history: Written, identity: str) -> Checkpoint:
    return Checkpoint(
        state=loop.policy_state,
        best=loop.best,
        bad_steps=loop.bad_steps,
        seconds=loop.elapsed(),
        history=history,
        identity=identity,
    )
