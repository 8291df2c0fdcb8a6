"""search: from scores to a decision, step by step; it can be stopped at any step and goes on as if it never was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from torch import Tensor

from pgprune_cli.arch import Keep
from pgprune_cli.atomic import write_bytes
from pgprune_cli.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from pgprune_cli.core.policy import entropy, starting_theta
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import Budget, MaskSpace, budget_of
from pgprune_cli.core.step import SearchState, begin, propose, scheduled, update
from pgprune_cli.data import Batches
from pgprune_cli.decision import RECORD, Decision
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.jobs.init_scores import SCORES, Scores, compute_scores, load_text
from pgprune_cli.loading import load_model, resolve
from pgprune_cli.progress import Row, SearchProgress, memory_in_use, working
from pgprune_cli.recipe import Evaluation, Recipe, dump
from pgprune_cli.saliency import flat_saliency
from pgprune_cli.substrate import Evaluator

METRICS_FILE = "metrics.jsonl"
RECIPE_FILE = "recipe.yaml"
BAD_STEPS = 10
"""After so many steps in a row without one finite loss, a search gives up."""


class Interrupted(Exception):  # noqa: N818  (a stop that was asked for is no error)
    """A signal asked the search to stop, and its state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum, step)
        self.signum = signum
        self.step = step


@dataclass
class Problem:
    """What is searched: fixed once the model, the text and the scores are there."""

    evaluator: Evaluator
    space: MaskSpace
    budget: Budget
    batches: Batches
    heldout: Tensor
    recipe: Recipe

    def keep(self, mask: Tensor) -> Keep:
        return self.evaluator.shape.keep(self.space, mask)

    def heldout_loss(self, theta: Tensor) -> float:
        """Of θ's hard mask on text the search never sees: nats per token."""
        keep = self.keep(hard_mask(theta, self.space, self.budget))
        batches = self.heldout.split(self.recipe.calibration.batch)
        losses = [float(self.evaluator.losses([keep], tokens)[0]) * len(tokens) for tokens in batches]
        return sum(losses) / len(self.heldout)


@dataclass
class Loop:
    """Where the search stands: what a checkpoint holds."""

    state: SearchState
    data_position: int = 0
    bad_steps: int = 0
    forwards: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


def search(recipe: Recipe, run: Path, quiet: bool = False) -> Decision:
    """Searches as the recipe says, or goes on where an earlier call was stopped, and writes the decision into `run`.

    Raises UserError for a run directory of another recipe or with damage in it, RunError where every loss is bad,
    Interrupted after a signal, with the state saved.
    """
    if (run / RECORD).exists():
        decision = Decision.load(run)
        _refuse_other_recipe(run, recipe)
        return decision
    source = resolve(recipe.model)
    text = load_text(recipe, source, quiet)
    with working(f"loading {recipe.model}", quiet):
        model = load_model(source, recipe.dtype, recipe.device)
    fingerprint = source.fingerprint()
    if (run / SCORES).exists():
        scores = Scores.load(run)
        if scores.fingerprint != fingerprint:
            raise UserError(f"{run / SCORES}: scores of another model than {recipe.model}; run `pgprune init-scores`")
    else:
        scores = compute_scores(recipe, run, source, model, text, quiet)
    # what is recorded is what was done: the scores may have been made with `init-scores --metric`
    recipe = replace(recipe, saliency=replace(recipe.saliency, metric=scores.metric))
    _refuse_other_recipe(run, recipe)
    write_bytes(run / RECIPE_FILE, dump(recipe).encode())

    evaluator = Evaluator(model)
    space = evaluator.shape.space(recipe.units.families)
    problem = Problem(
        evaluator,
        space,
        budget_of(space, recipe.budget.sparsity, recipe.budget.scope),
        Batches(text.search, recipe.calibration.batch, recipe.seed),
        text.heldout,
        recipe,
    )
    saliency = flat_saliency(scores.tensors, evaluator.shape, space)
    theta = starting_theta(saliency, space, problem.budget, recipe.policy.start, recipe.policy.temperature)
    loop, heldout_loss = _run_steps(problem, run, theta, _identity(recipe, fingerprint, theta), quiet)

    mask = hard_mask(loop.state.theta, space, problem.budget)
    decision = Decision(
        keep=problem.keep(mask),
        model=recipe.model,
        fingerprint=fingerprint,
        sparsity=1.0 - int(space.costs[mask].sum()) / int(space.costs.sum()),
        recipe=dump(recipe),
        steps=loop.state.step,
        forwards=loop.forwards,
        heldout_loss=heldout_loss if math.isfinite(heldout_loss) else None,
    )
    decision.save(run)
    return decision


def _run_steps(problem: Problem, run: Path, theta: Tensor, identity: str, quiet: bool) -> tuple[Loop, float]:
    """The loop. Returns where it ended and the held-out loss of the final hard mask, nats per token."""
    recipe, schedule = problem.recipe, problem.recipe.search
    loop = _resumed(run, identity) or Loop(begin(theta, recipe.seed))
    heldout_loss: float | None = None
    with SearchProgress(schedule.steps, quiet) as progress, _History(run) as history, _stop_signals() as stop:
        if loop.state.step:
            progress.say(f"going on from step {loop.state.step} of {schedule.steps}")
        while loop.state.step < schedule.steps:
            row = _one_step(problem, loop)
            heldout_loss = row.heldout_loss
            history.append(row)
            progress.show(row)
            done = loop.state.step == schedule.steps
            if stop or done or loop.state.step % schedule.checkpoint_every == 0:
                save_checkpoint(run, _checkpoint(loop, recipe, history.flush(), identity))
            if stop and not done:
                raise Interrupted(stop[0], loop.state.step)
    return loop, problem.heldout_loss(loop.state.theta) if heldout_loss is None else heldout_loss


def _one_step(problem: Problem, loop: Loop) -> Row:
    """Sample masks, hear their losses on the next batch, move θ: `core.step` with the model in it. Advances `loop`."""
    recipe, schedule = problem.recipe, problem.recipe.search
    began = time.perf_counter()
    tokens = problem.batches.at(loop.data_position)
    state, masks = propose(loop.state, schedule.samples)
    losses = problem.evaluator.losses([problem.keep(mask) for mask in masks], tokens)
    rate = scheduled(schedule.learning_rate, schedule.schedule, state.step, schedule.steps)
    loop.state = update(state, masks, losses, problem.space, problem.budget, schedule.estimator, rate)
    spent = time.perf_counter() - began

    loop.data_position += 1
    loop.forwards += len(masks)
    loop.bad_steps = 0 if losses.isfinite().any() else loop.bad_steps + 1
    if loop.bad_steps >= min(BAD_STEPS, schedule.steps):
        raise RunError(
            f"step {loop.state.step}: no finite loss in {loop.bad_steps} steps; the model overflows in {recipe.dtype}: "
            "try dtype float32 or bfloat16, or a lower sparsity"
        )
    step = loop.state.step
    due = step % schedule.evaluate_every == 0 or step in (1, schedule.steps)
    return Row(
        step=step,
        losses=[_finite(float(loss)) for loss in losses],
        baseline=loop.state.baseline,
        learning_rate=rate,
        entropy=float(entropy(loop.state.theta)),
        heldout_loss=_finite(problem.heldout_loss(loop.state.theta)) if due else None,
        skipped=loop.state.skipped,
        tokens_per_second=len(masks) * tokens.numel() / spent,
        memory_bytes=memory_in_use(),
        seconds=loop.elapsed(),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- what belongs to a run


def _identity(recipe: Recipe, fingerprint: str, theta: Tensor) -> str:
    """Digest of all that a checkpoint may not be mixed up with: the recipe, the model and the starting θ."""
    return hashlib.sha256(_comparable(recipe).encode() + fingerprint.encode() + theta.numpy().tobytes()).hexdigest()


def _comparable(recipe: Recipe) -> str:
    """The recipe without what changes no result: where it runs, how often it saves, what is evaluated later."""
    search = replace(recipe.search, checkpoint_every=1)
    return dump(replace(recipe, device="auto", evaluation=Evaluation(), search=search))


def _refuse_other_recipe(run: Path, recipe: Recipe) -> None:
    from pgprune_cli.recipe import load

    if not (run / RECIPE_FILE).exists():
        return
    before = _comparable(load(run / RECIPE_FILE)).splitlines()
    now = _comparable(recipe).splitlines()
    changed = [f"{b.strip()} → {n.strip()}" for b, n in zip(before, now, strict=True) if b != n]
    if changed:
        raise UserError(
            f"{run}: belongs to another recipe ({'; '.join(changed)}); give another directory with --out, "
            "or remove this one to start over"
        )


def _resumed(run: Path, identity: str) -> Loop | None:
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        (run / METRICS_FILE).unlink(missing_ok=True)
        return None
    if checkpoint.identity != identity:
        raise UserError(f"{run}: its checkpoint belongs to other scores or another model; remove it to start over")
    history = run / METRICS_FILE
    size = history.stat().st_size if history.exists() else 0
    if size < checkpoint.history_bytes:
        raise UserError(f"{history}: {size} bytes where the checkpoint wrote {checkpoint.history_bytes}: it was cut")
    os.truncate(history, checkpoint.history_bytes)
    return Loop(
        checkpoint.state, checkpoint.data_position, checkpoint.bad_steps, checkpoint.forwards, checkpoint.seconds
    )


def _checkpoint(loop: Loop, recipe: Recipe, history_bytes: int, identity: str) -> Checkpoint:
    schedule = (recipe.search.schedule, recipe.search.learning_rate, recipe.search.steps)
    return Checkpoint(
        loop.state,
        loop.data_position,
        schedule,
        loop.bad_steps,
        loop.forwards,
        loop.elapsed(),
        history_bytes,
        identity,
    )


class _History:
    """`metrics.jsonl`, one row a step."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.file = (run / METRICS_FILE).open("a", encoding="utf-8")

    def __enter__(self) -> _History:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, row: Row) -> None:
        self.file.write(json.dumps(asdict(row), allow_nan=False) + "\n")
        self.file.flush()

    def flush(self) -> int:
        """Makes all rows durable. Returns the file's length in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that holds the signal once SIGINT or SIGTERM came. A second one acts as if this were not here."""
    caught: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def note(signum: int, _: FrameType | None) -> None:
        caught.append(signum)
        restore()

    for signum in before:
        signal.signal(signum, note)
    try:
        yield caught
    finally:
        restore()
