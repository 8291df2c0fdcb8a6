"""search: from scores to a decision. The loop is in search/loop.py, what it optimises in search/problem.py."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.core.grid import GridCost
from pgprune_cli.core.space import BLOCKS_OF, Budget, MaskSpace
from pgprune_cli.distributed import Ranks, join
from pgprune_cli.errors import UserError
from pgprune_cli.jobs.memory import SEARCH_CHECKS, devices_for, need_of
from pgprune_cli.model.loading import load_prunable
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import Partitions
from pgprune_cli.recipe.reader import dump
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.least_squares import Repaired, repair
from pgprune_cli.repair.width_files import remove_widths
from pgprune_cli.run.decision import Decision, ancestry
from pgprune_cli.run.layout import COSTS_FILE, DECISION_RECORD, RECIPE_FILE, refuse_other_content
from pgprune_cli.run.lock import locked
from pgprune_cli.run.provenance import record_command
from pgprune_cli.run.resume import identity_of, load_finished, refuse_other_recipe
from pgprune_cli.run.scores import Scores
from pgprune_cli.run.settled import settled
from pgprune_cli.run.trackers import TrackerName, check_installed
from pgprune_cli.search.budget import budget_for
from pgprune_cli.search.checks import run_checks
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.loop import LoopState, run_steps
from pgprune_cli.search.phases import Stopwatch
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.problem import Problem, set_up
from pgprune_cli.search.sampled_text import text_of_repair
from pgprune_cli.search.scoring import load_or_compute_scores
from pgprune_cli.search.texts import calibration_forward_passes, reselects
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import finite


def search(
    recipe: Recipe,
    run: Path,
    *,
    skip_corrupt_checkpoint: bool = False,
    tracker: TrackerName | None = None,
    shared_widths: Path | None = None,
    progress: Progress = SILENT,
) -> Decision:
    """Search as the recipe says, or resume an interrupted search, and write the decision into `run`.

    Under torchrun all processes call this alike, and only the writer among them writes.

    Args:
        skip_corrupt_checkpoint: if the newest checkpoint is damaged, resume from the one before it.
        tracker: logs every step.
        shared_widths: a directory that keeps the width table for other searches. By default it is in `run`, and removed
            when the search is finished.

    Raises:
        UserError: the run directory belongs to another recipe, is damaged or in use; the recipe does not fit the model.
        RunError: the losses are never finite, or another process of the search has died.
        Interrupted: a signal stopped the search; its state is saved.
    """
    refuse_other_content(run)  # an exported model has a decision, too
    recipe = settled(recipe, run)
    if (run / DECISION_RECORD).exists():
        return load_finished(run, recipe)
    if tracker is not None:
        check_installed(tracker)
    stopwatch = Stopwatch()
    with join() as ranks, ExitStack() as until_finished:
        with stopwatch.timed("opening"):
            context = _open(recipe, run, ranks, progress if ranks.is_writer else SILENT, until_finished)
        context = replace(context, shared_widths=shared_widths)
        decision = _search(context, stopwatch, skip_corrupt_checkpoint, tracker)
        if ranks.is_writer:
            remove_widths(run)  # every process has computed the final loss: nobody reads them any more
            decision.save(run)
    return decision


def _search(
    context: SearchContext, stopwatch: Stopwatch, skip_corrupt_checkpoint: bool, tracker: TrackerName | None
) -> Decision:
    """Run the phases of a search in order: scores, width table, steps, repair."""
    with stopwatch.timed("scores"):
        scores = load_or_compute_scores(context)
    # Record what was done: the scores may have been made with `init-scores --metric`.
    score_settings = replace(context.recipe.scores, metric=scores.metric)
    context = replace(context, recipe=replace(context.recipe, scores=score_settings))
    with stopwatch.timed("opening"):
        space, budget, partitions = _begin(context, scores)
    with stopwatch.timed("width table"):
        problem = set_up(context, space, budget, partitions, scores)
    identity = identity_of(context.recipe, context.fingerprint, problem.policy.origin)
    loop = run_steps(problem, identity, skip_corrupt_checkpoint=skip_corrupt_checkpoint, tracker=tracker)
    stopwatch.seconds["steps"] = loop.elapsed()
    with stopwatch.timed("repair"):
        decision = _decide(problem, loop)
    return replace(decision, phases=stopwatch.seconds)


def _open(recipe: Recipe, run: Path, ranks: Ranks, progress: Progress, until_finished: ExitStack) -> SearchContext:
    """Make the checks of a search, lock its directory until it is finished, and load the model."""
    preparation = Preparation(recipe, run if ranks.is_writer else None, progress)
    with ranks.run_writer_first():  # one process downloads the config, the others find it there
        parsed_once = preparation.parsed_once()
    with parsed_once:
        with ranks.run_writer_first():  # one process downloads and tokenises, the others find it done
            run_checks(preparation, SEARCH_CHECKS)
        if ranks.is_writer:
            until_finished.enter_context(locked(run))
        source, text, needed = preparation.source, preparation.text, need_of(preparation)
        with progress.working(f"loading {recipe.model}"):
            model = load_prunable(source, recipe.dtype, devices_for(preparation, needed), recipe.weight_format)
        step_bytes = needed.step if model.device.type == "cuda" else 0  # to place the width table
    return SearchContext(recipe, run, source, model, text, ranks, progress, step_bytes=step_bytes)


def _begin(context: SearchContext, scores: Scores) -> tuple[MaskSpace, Budget, Partitions]:
    """Check the budget against the model, then write the resolved recipe into the run directory.

    Raises UserError if the directory was begun with another recipe, or if the model's sizes cannot meet the budget:
    then nothing is written, and the corrected recipe is accepted.
    """
    with context.ranks.run_writer_first():  # one process measures latencies and writes, the others read
        refuse_other_recipe(context.run, context.recipe, same_model=True)  # the scores are of this model
        try:
            space, budget, partitions = budget_for(context, scores)
        except UserError:
            if not (context.run / RECIPE_FILE).exists():  # a latency measured for the refused recipe
                (context.run / COSTS_FILE).unlink(missing_ok=True)
            raise
        if context.ranks.is_writer:
            write_bytes(context.run / RECIPE_FILE, dump(context.recipe).encode())
            record_command(context.run)
    return space, budget, partitions


def _decide(problem: Problem, loop: LoopState) -> Decision:
    """Repair the best decision that the search evaluated, measure it on held-out text, and describe it.

    A search without steps, or without a finite held-out objective, decides on what it ended with.
    """
    context, recipe = problem.context, problem.context.recipe
    policy, best = problem.policy, loop.best
    mask = policy.final_mask(policy.centre(loop.policy_state) if best is None else best.centre)
    model_mask, repaired = _repaired(context, problem.model_mask(mask))
    heldout = problem.objective.on_heldout(model_mask, repaired)
    if repaired and best is not None and not heldout.objective <= best.objective:
        raised = f"from {best.objective:.4f} to {heldout.objective:.4f} nats per token"
        advice = "Use more repair.windows, or a larger repair.damping."
        context.progress.say(f"warning: the last repair raised the held-out objective {raised}. {advice}")
    dense = problem.objective.on_heldout(problem.model_mask(torch.ones_like(mask)), {})
    return Decision(
        model_mask=model_mask,
        model=recipe.model,
        fingerprint=context.fingerprint,
        base=context.fingerprint_parts,
        sparsity=_sparsity(context, model_mask),
        recipe=dump(recipe),
        steps=loop.step,
        forward_passes=loop.step * recipe.search.masks_per_step,
        calibration_forward_passes=calibration_forward_passes(recipe, context.text, context.model),
        heldout_loss=finite(heldout.loss),
        dense_loss=finite(dense.loss),
        heldout_objective=finite(heldout.objective),
        best_step=None if best is None else best.step,
        bos=context.text.bos is not None,
        repaired=repaired,
        budget={
            "measure": recipe.budget.measure,
            "kept": int(problem.space.costs[mask].sum()) / int(problem.space.costs.sum()),
        },
        ancestors=ancestry(context.source.directory) if context.source.gguf is None else [],
    )


def _sparsity(context: SearchContext, model_mask: ModelMask) -> float:
    """Return the removed fraction of the parameters of the blocks that the recipe prunes."""
    shape, families = context.model.shape, context.recipe.units.families
    pruned = {block for family in families for block in BLOCKS_OF[family]}
    parameters = {
        name: costs if name in pruned else (GridCost(0),) * shape.layers for name, costs in shape.parameters.items()
    }
    return 1.0 - shape.cost(parameters, model_mask) / shape.cost(parameters)


def _repaired(context: SearchContext, model_mask: ModelMask) -> Repaired:
    settings = context.recipe.repair
    if settings.method == "none":
        return Repaired(model_mask, {})
    notes: list[str] = []
    batches = text_of_repair(context)
    knows_roots = reselects(context.recipe) and batches is context.repair_batches  # the text of the width table
    with context.progress.layers("repairing the kept weights", len(model_mask)) as layers:
        repaired = repair(
            context.model,
            model_mask,
            batches,
            settings.method,
            settings.damping,
            epochs=settings.epochs if settings.fits_blocks else 0,
            last_layers=settings.fitted_last_layers,
            reselect=reselects(context.recipe),
            roots=context.error_roots if knows_roots else None,
            ranks=context.ranks,
            progress=layers,
            note=notes.append,
        )
    for note in notes:
        context.progress.say(note)
    return repaired
