"""pgprune search: which units stay."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pgprune_cli.cli.options import AsJson, Out, Quiet, RecipeName, Set, examples, opened, progress_of
from pgprune_cli.cli.saved import of_search
from pgprune_cli.cli.stopping import resumable
from pgprune_cli.cli.tables import print_estimate, print_result
from pgprune_cli.console.stderr import STDERR
from pgprune_cli.distributed import of_environment

EXAMPLES = examples(
    "search demo",
    "search mine.yaml --out runs/mine",
    "search llama2-7b-50 --set model=/data/my-llama --set budget.sparsity=0.4",
)


def search(
    recipe: RecipeName,
    out: Out = None,
    overrides: Set = None,
    log: Annotated[
        Literal["tensorboard", "trackio", "wandb"] | None,
        typer.Option("--tracker", help="Tell a tracker every step, too; an extra of the same name installs it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load nothing; print what memory, forward passes and time it would take.")
    ] = False,
    skip_corrupt_checkpoint: Annotated[
        bool,
        typer.Option(
            "--skip-corrupt-checkpoint", help="Where the newest checkpoint is damaged, go on from the one before."
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search which units to keep. Goes on by itself where an earlier call was stopped."""
    loaded, run = opened(recipe, out, overrides or [])
    if dry_run:
        from pgprune_cli.jobs.estimate import estimate

        print_estimate(estimate(loaded, progress=progress_of(quiet)), as_json)
        return
    from pgprune_cli.jobs.search import search
    from pgprune_cli.run.layout import DECISION_MASKS

    with resumable(lambda step: of_search(run, loaded.search.steps, step)):
        decision = search(
            loaded, run, skip_corrupt_checkpoint=skip_corrupt_checkpoint, tracker=log, progress=progress_of(quiet)
        )
    if not of_environment().writer:
        return
    result = {
        "run": str(run),
        "decision": str(run / DECISION_MASKS),
        "sparsity": decision.sparsity,
        "steps": decision.steps,
        "forward_passes": decision.forward_passes,
        "heldout_loss": decision.heldout_loss,
        "dense_loss": decision.dense_loss,
    }
    loss = "not finite" if decision.heldout_loss is None else f"{decision.heldout_loss:.4f} nats per token"
    dense = "" if decision.dense_loss is None else f", of the dense model {decision.dense_loss:.4f}"
    print_result(
        result,
        as_json,
        f"{run / DECISION_MASKS}: sparsity {decision.sparsity:.4f} after {decision.steps} steps, "
        f"{decision.forward_passes} forward passes; held-out loss {loss}{dense}",
    )
    if not quiet:
        print(f"next: pgprune export {run}, or pgprune eval {run}", file=STDERR)
