"""search: from scores to a decision, step by step; it can be stopped at any step and goes on as if it never was."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from pgprune_cli.arch import Keep, Outputs
from pgprune_cli.atomic import write_bytes
from pgprune_cli.budget import budget_for
from pgprune_cli.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from pgprune_cli.core.policy import starting_theta
from pgprune_cli.core.space import Budget, MaskSpace
from pgprune_cli.core.step import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.data import Batches, CalibrationText, spread
from pgprune_cli.decision import Decision
from pgprune_cli.distributed import Ranks, joined
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.history import History, Row, Written, read_history
from pgprune_cli.jobs.init_scores import compute_scores, load_text, scoring_batches
from pgprune_cli.jobs.run_directory import finished, identity_of, refuse_other_recipe, resumed
from pgprune_cli.loading import Source, load_model, resolve
from pgprune_cli.lock import locked
from pgprune_cli.policies import LayerPolicy, Policy, UnitPolicy
from pgprune_cli.progress import SearchProgress, memory_in_use, working
from pgprune_cli.provenance import note
from pgprune_cli.recipe import Recipe
from pgprune_cli.recipe_reader import dump
from pgprune_cli.reconstruct import PASSES, Repaired, repair
from pgprune_cli.run_files import RECIPE_FILE, RECORD, SCORES
from pgprune_cli.saliency import CALIBRATED, NEEDS, flat_saliency
from pgprune_cli.scores import Scores
from pgprune_cli.sensitivity import some_windows
from pgprune_cli.signals import stopping
from pgprune_cli.substrate import Evaluator
from pgprune_cli.trackers import TrackerName, check_installed, tracking
from pgprune_cli.width_table import width_table

BAD_STEPS = 10
"""After so many steps in a row without one finite loss, a search gives up."""
REPAIR_TOKENS = 4096
"""Tokens of one forward pass of the repair, at least: few large products are quicker than many small ones."""


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
    policy: Policy  # type: ignore[type-arg]  # of the state that it began with
    batches: Batches
    heldout: Tensor
    recipe: Recipe
    ranks: Ranks

    def keep(self, mask: Tensor) -> Keep:
        return self.evaluator.shape.keep(self.space, mask)

    def losses(self, masks: Tensor, tokens: Tensor) -> Tensor:
        """Of masks `(K, n)` on one batch, with the repair that the policy has for each: `(K,)` nats per token."""
        self.ranks.refuse_differences(masks, tokens)
        keeps = [self.keep(masks[index]) for index in self.ranks.share(len(masks))]
        own = self.evaluator.losses(keeps, tokens, [self.policy.outputs(keep) for keep in keeps])
        return self.ranks.gathered(own, len(masks))

    def heldout_loss(self, keep: Keep, outputs: Outputs) -> float:
        """Of one decision on text the search never sees: nats per token."""
        batches = self.heldout.split(self.recipe.calibration.batch)
        share = [batches[index] for index in self.ranks.share(len(batches))]
        own = [float(self.evaluator.losses([keep], tokens, [outputs])[0]) for tokens in share]
        losses = self.ranks.gathered(torch.tensor(own, dtype=torch.float64), len(batches)).tolist()
        return sum(loss * len(tokens) for loss, tokens in zip(losses, batches, strict=True)) / len(self.heldout)


@dataclass
class Loop:
    """Where the search stands: what a checkpoint holds."""

    state: SearchState | WidthState
    data_position: int = 0
    bad_steps: int = 0
    forwards: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started


def search(
    recipe: Recipe, run: Path, quiet: bool = False, skip_damaged: bool = False, log: TrackerName | None = None
) -> Decision:
    """Searches as the recipe says, or goes on where an earlier call was stopped, and writes the decision into `run`.

    `skip_damaged`: where the newest checkpoint is damaged, goes on from the one before it. `log`: a tracker that is
    told every step. Under torchrun all processes call it alike, and the writer among them writes. Raises UserError for
    a run directory of another recipe, with damage in it or with another process in it, RunError where every loss is bad
    or another process of the search is gone, Interrupted after a signal, with the state saved.
    """
    if (run / RECORD).exists():
        return finished(run, recipe)
    if log is not None:
        check_installed(log)
    with joined() as ranks, locked(run) if ranks.writer else nullcontext():
        decision = _search(recipe, run, quiet or not ranks.writer, skip_damaged, log if ranks.writer else None, ranks)
        if ranks.writer:
            decision.save(run)
    return decision


def _search(
    recipe: Recipe, run: Path, quiet: bool, skip_damaged: bool, log: TrackerName | None, ranks: Ranks
) -> Decision:
    with ranks.writer_first():
        source = resolve(recipe.model)
        text = load_text(recipe, source, quiet)
    with working(f"loading {recipe.model}", quiet):
        model = load_model(source, recipe.dtype, recipe.device)
    fingerprint = source.fingerprint()
    evaluator = Evaluator(model)
    with ranks.writer_first():
        scores = _scores(recipe, run, source, model, text, quiet)
        # what is recorded is what was done: the scores may have been made with `init-scores --metric`
        recipe = replace(recipe, saliency=replace(recipe.saliency, metric=scores.metric))
        refuse_other_recipe(run, recipe)
        if ranks.writer:
            write_bytes(run / RECIPE_FILE, dump(recipe).encode())
            note(run)
        space, budget = budget_for(recipe, evaluator, run, fingerprint, quiet)
    problem = Problem(
        evaluator,
        space,
        _policy(recipe, evaluator, space, budget, scores, text, quiet),
        Batches(text.search, recipe.calibration.batch, recipe.seed),
        text.heldout,
        recipe,
        ranks,
    )
    identity = identity_of(recipe, fingerprint, problem.policy.origin)
    loop = _run_steps(problem, run, identity, quiet, skip_damaged, log)

    mask = problem.policy.final_mask(loop.state)
    keep = problem.keep(mask)
    parameters = evaluator.shape.space(recipe.units.families).costs
    keep, outputs = _repaired(recipe, model, keep, text, quiet)
    heldout_loss = problem.heldout_loss(keep, outputs)
    return Decision(
        keep=keep,
        model=recipe.model,
        fingerprint=fingerprint,
        sparsity=1.0 - int(parameters[mask].sum()) / int(parameters.sum()),
        recipe=dump(recipe),
        steps=loop.state.step,
        forwards=loop.forwards,
        calibration_forwards=calibration_forwards(recipe, text),
        heldout_loss=heldout_loss if math.isfinite(heldout_loss) else None,
        outputs=outputs,
        budget={"of": recipe.budget.of, "kept": int(space.costs[mask].sum()) / int(space.costs.sum())},
    )


def _scores(recipe: Recipe, run: Path, source: Source, model: nn.Module, text: CalibrationText, quiet: bool) -> Scores:
    """Those of the run where it has some. Raises UserError where they are another model's."""
    if not (run / SCORES).exists():
        scores = compute_scores(recipe, source, model, text, quiet)
        scores.save(run)
        return scores
    scores = Scores.load(run)
    if scores.fingerprint != source.fingerprint():
        raise UserError(f"{run / SCORES}: scores of another model than {recipe.model}; run `pgprune init-scores`")
    return scores


def _policy(
    recipe: Recipe,
    evaluator: Evaluator,
    space: MaskSpace,
    budget: Budget,
    scores: Scores,
    text: CalibrationText,
    quiet: bool,
) -> UnitPolicy | LayerPolicy:
    """What the recipe searches with. Raises UserError for families that the layers policy has no widths of."""
    settings = recipe.search
    if settings.policy == "units":
        saliency = flat_saliency(scores.tensors, evaluator.shape, space)
        theta = starting_theta(saliency, space, budget, recipe.policy.start, recipe.policy.temperature)
        estimator, rate, schedule = settings.estimator, settings.learning_rate, settings.schedule
        return UnitPolicy(theta, space, budget, estimator, rate, schedule, settings.steps)
    if whole := [name for name in recipe.units.families if name not in ("attention", "ffn")]:
        raise UserError(
            f"units.families: {whole[0]} is kept or removed as a whole, so there are no widths to search over; "
            "set search.policy to units"
        )
    saliency_of: dict[tuple[int, str], Tensor] = {
        (index, name): scores.tensors[f"layers.{index}.{name}"]
        for name in recipe.units.families
        for index in range(len(evaluator.shape.channels))
    }
    with working("measuring what every width of every layer loses", quiet):
        solve = recipe.reconstruct.method.startswith("least-squares")
        damping = recipe.reconstruct.damping
        multiple = recipe.budget.ffn_multiple
        table = width_table(evaluator.model, saliency_of, repair_batches(recipe, text), damping, solve, multiple)
    return LayerPolicy(table, table.priorities(space), space, budget)


def repair_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """The windows that repair is fitted to, as many tokens at a time as the search has at least."""
    windows = spread(text.search, recipe.reconstruct.sequences)
    return list(windows.split(max(recipe.calibration.batch, REPAIR_TOKENS // windows.shape[1])))


def _repaired(recipe: Recipe, model: nn.Module, keep: Keep, text: CalibrationText, quiet: bool) -> Repaired:
    if recipe.reconstruct.method == "none":
        return Repaired(keep, {})
    with working("repairing the kept weights", quiet):
        settings = recipe.reconstruct
        batches = repair_batches(recipe, text)
        return repair(model, keep, batches, settings.method, settings.damping, _reselects(recipe))


def _reselects(recipe: Recipe) -> bool:
    """Whether the repair chooses the units: a search over widths has only said how many, one over units which."""
    return recipe.search.policy == "layers"


def calibration_forwards(recipe: Recipe, text: CalibrationText) -> int:
    """Passes over calibration text besides the search's, in batches of the search."""
    repaired = recipe.reconstruct.method != "none"
    read: list[Tensor] = []
    if recipe.saliency.metric in CALIBRATED:
        scoring = scoring_batches(recipe, text)
        read += scoring
        if NEEDS[recipe.saliency.metric] == "covariance":
            read += some_windows(scoring)
    repairing = repair_batches(recipe, text)
    if recipe.search.policy == "layers":
        read += repairing + some_windows(repairing)
    if repaired:
        read += PASSES * repairing
    if repaired and _reselects(recipe):
        read += some_windows(repairing)
    return math.ceil(sum(map(Tensor.numel, read)) / (recipe.calibration.batch * recipe.calibration.seqlen))


def _run_steps(
    problem: Problem, run: Path, identity: str, quiet: bool, skip_damaged: bool, log: TrackerName | None
) -> Loop:
    """The loop. Returns where it ended."""
    recipe, schedule, ranks = problem.recipe, problem.recipe.search, problem.ranks
    with ranks.writer_first():
        loop = _loop(problem, resumed(run, identity, skip_damaged) if ranks.writer else latest_checkpoint(run))
    units = {family.name: family.counts for family in problem.space.families}
    budget = f"{recipe.budget.sparsity:.0%} of {recipe.budget.of} go"
    shown = SearchProgress(schedule.steps, units, budget, read_history(run) if ranks.writer else (), quiet)
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
    state, draws, masks = policy.propose(loop.state, schedule.samples)
    losses = problem.losses(masks, tokens)
    rate = policy.rate(state)
    loop.state = policy.update(state, draws, losses)
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
    mask = policy.mask(loop.state) if due else None
    decided = None if mask is None else problem.keep(mask)
    return Row(
        step=step,
        losses=[_finite(float(loss)) for loss in losses],
        baseline=loop.state.baseline if isinstance(loop.state, SearchState) else None,
        learning_rate=rate,
        entropy=policy.entropy(loop.state),
        heldout_loss=_finite(problem.heldout_loss(decided, policy.outputs(decided))) if decided else None,
        skipped=loop.state.skipped,
        tokens_per_second=len(masks) * tokens.numel() / spent,
        memory_bytes=memory_in_use(),
        seconds=loop.elapsed(),
        kept=None if mask is None else problem.space.widths(mask),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _loop(problem: Problem, found: Checkpoint | None) -> Loop:
    """Where the search stands: at its beginning, or where a checkpoint was found."""
    if found is None:
        return Loop(problem.policy.begin(problem.recipe.seed))
    return Loop(found.state, found.data_position, found.bad_steps, found.forwards, found.seconds)


def _checkpoint(loop: Loop, recipe: Recipe, history: Written, identity: str) -> Checkpoint:
    schedule = (recipe.search.schedule, recipe.search.learning_rate, recipe.search.steps)
    return Checkpoint(
        loop.state,
        loop.data_position,
        schedule,
        loop.bad_steps,
        loop.forwards,
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
