"""search: from scores to a decision. Wires the parts; `loop.py` has the steps, `problem.py` what they decide on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.data.windows import Batches, CalibrationText
from pgprune_cli.distributed import Ranks, joined
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.prunable import ModelMask
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import dump
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.least_squares import Repaired, repair
from pgprune_cli.repair.width_files import remove_widths
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import DECISION_RECORD, RECIPE_FILE
from pgprune_cli.run.lock import locked
from pgprune_cli.run.provenance import note
from pgprune_cli.run.resume import finished, identity_of, refuse_other_recipe
from pgprune_cli.search.budget import budget_for
from pgprune_cli.search.loop import finite, run_steps
from pgprune_cli.search.problem import Problem, policy_of
from pgprune_cli.search.scoring import scores_of
from pgprune_cli.search.texts import _reselects, calibration_forward_passes, load_text, repair_batches
from pgprune_cli.search.trackers import TrackerName, check_installed
from pgprune_cli.storage.atomic import write_bytes


def search(
    recipe: Recipe,
    run: Path,
    progress: Progress = SILENT,
    skip_corrupt_checkpoint: bool = False,
    log: TrackerName | None = None,
) -> Decision:
    """Searches as the recipe says, or goes on where an earlier call was stopped, and writes the decision into `run`.

    `skip_corrupt_checkpoint`: where the newest checkpoint is damaged, goes on from the one before it. `log`: a tracker that is
    told every step. Under torchrun all processes call it alike, and the writer among them writes. Raises UserError for
    a run directory of another recipe, with damage in it or with another process in it, RunError where every loss is bad
    or another process of the search is gone, Interrupted after a signal, with the state saved.
    """
    if (run / DECISION_RECORD).exists():
        return finished(run, recipe)
    if log is not None:
        check_installed(log)
    with joined() as ranks, locked(run) if ranks.writer else nullcontext():
        decision = _search(
            recipe,
            run,
            progress if ranks.writer else SILENT,
            skip_corrupt_checkpoint,
            log if ranks.writer else None,
            ranks,
        )
        if ranks.writer:
            remove_widths(run)  # nobody reads them any more: all have been heard on the final loss
            decision.save(run)
    return decision


def _search(
    recipe: Recipe, run: Path, progress: Progress, skip_corrupt_checkpoint: bool, log: TrackerName | None, ranks: Ranks
) -> Decision:
    with ranks.writer_first():
        source = resolve(recipe.model)
        text = load_text(recipe, source, progress)
    with progress.working(f"loading {recipe.model}"):
        model = load_model(source, recipe.dtype, recipe.device, recipe.weight_format)
    fingerprint = source.fingerprint()
    evaluator = Evaluator(model)
    scores = scores_of(recipe, run, source, model, text, progress, ranks)
    with ranks.writer_first():
        # what is recorded is what was done: the scores may have been made with `init-scores --metric`
        recipe = replace(recipe, scores=replace(recipe.scores, metric=scores.metric))
        refuse_other_recipe(run, recipe)
        if ranks.writer:
            write_bytes(run / RECIPE_FILE, dump(recipe).encode())
            note(run)
        space, budget = budget_for(recipe, evaluator, run, fingerprint, progress)
    problem = Problem(
        evaluator,
        space,
        policy_of(recipe, run, evaluator, space, budget, scores, text, ranks, progress),
        Batches(text.search, recipe.calibration.batch, recipe.seed),
        text.heldout,
        recipe,
        ranks,
    )
    identity = identity_of(recipe, fingerprint, problem.policy.origin)
    loop = run_steps(problem, run, identity, progress, skip_corrupt_checkpoint, log)

    mask = problem.policy.final_mask(loop.state)
    keep = problem.keep(mask)
    parameters = evaluator.shape.space(recipe.units.families).costs
    keep, outputs = _repaired(recipe, model, keep, text, progress)
    heldout_loss = problem.heldout_loss(keep, outputs)
    dense_loss = problem.heldout_loss(problem.keep(torch.ones_like(mask)), {})
    return Decision(
        model_mask=keep,
        model=recipe.model,
        fingerprint=fingerprint,
        sparsity=1.0 - int(parameters[mask].sum()) / int(parameters.sum()),
        recipe=dump(recipe),
        steps=loop.state.step,
        forward_passes=loop.forward_passes,
        calibration_forward_passes=calibration_forward_passes(recipe, text),
        heldout_loss=finite(heldout_loss),
        dense_loss=finite(dense_loss),
        outputs=outputs,
        budget={"measure": recipe.budget.measure, "kept": int(space.costs[mask].sum()) / int(space.costs.sum())},
    )


def _repaired(recipe: Recipe, model: nn.Module, keep: ModelMask, text: CalibrationText, progress: Progress) -> Repaired:
    if recipe.repair.method == "none":
        return Repaired(keep, {})
    with progress.layers("repairing the kept weights", len(keep)) as bar:
        settings = recipe.repair
        batches = repair_batches(recipe, text)
        chosen_anew = _reselects(recipe)
        return repair(
            model,
            keep,
            batches,
            settings.method,
            settings.damping,
            chosen_anew,
            lambda _: bar.layer_done(),
            bar.batches_done,
        )
