"""make demo: prune the model that ships with the package, and print a table of the results.

It runs the commands that a user would run: init-scores, search, export, eval. It runs them a second time without search
steps, to show what the scores alone achieve with the same budget, and recovers that model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS, MODELS = Path("runs"), Path("models")
RECIPE = "demo"


def pgprune(*arguments: str) -> str:
    """Run one command and return its stdout. Its progress goes to the terminal; if it fails, exit with its code."""
    print(f"\n$ pgprune {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "pgprune_cli", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def pruned(name: str, *overrides: str) -> tuple[Path, dict]:
    """Score, search and export. Return the directory of the exported model and the output of `search --json`."""
    run, model = RUNS / name, MODELS / name
    for leftover in (run, model):  # start afresh, or the demo would show the result of an earlier one
        shutil.rmtree(leftover, ignore_errors=True)
    pgprune("init-scores", RECIPE, "--out", str(run))
    decision = json.loads(pgprune("search", RECIPE, "--out", str(run), "--json", *overrides))
    pgprune("export", str(run), "--out", str(model))
    return model, decision


def recovered(model: Path) -> Path:
    """Train a pruned model for some seconds. Return the directory of the recovered model."""
    name = f"{model.name}-recovered"
    for leftover in (RUNS / name, MODELS / name):
        shutil.rmtree(leftover, ignore_errors=True)
    pgprune("recover", str(model), "--out", str(MODELS / name), "--run-dir", str(RUNS / name))
    return MODELS / name


def main() -> None:
    """Prune twice, recover one of the models, measure all and the original, and print the table."""
    no_search = ("search.forward_passes=0", "search.policy=units", "repair.method=none")
    metric_only, metric_decision = pruned("demo-metric-only", *(word for key in no_search for word in ("--set", key)))
    searched, decision = pruned("demo-searched")
    trained = recovered(metric_only)
    baselines = [word for model in (metric_only, "demo", trained) for word in ("--baseline", str(model))]
    measured = json.loads(
        pgprune("eval", str(searched), "--ppl", "demo", "--seqlen", "128", "--speed", "--json", *baselines)
    )
    scores_only, dense, after_recovery = measured["baselines"]

    table = Table(title="The demo model before and after pruning")
    for heading in ("model", "units removed", "parameters", "perplexity", "prefill tokens/s", "decode tokens/s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = [("original", 0.0, dense), ("pruned by scores alone", metric_decision["sparsity"], scores_only)]
    rows.append(("pruned by search", decision["sparsity"], measured))
    rows.append(("scores alone, recovered", metric_decision["sparsity"], after_recovery))
    for name, sparsity, result in rows:
        speed = result["speed"]
        table.add_row(
            name,
            f"{sparsity:.1%}",
            f"{result['parameters']:,}",
            f"{result['perplexity'][0]['ppl']:.2f}",
            f"{speed['prefill_tokens_per_second']:,.0f}",
            f"{speed['decode_tokens_per_second']:,.0f}",
        )
    console = Console()
    console.print(table)
    console.print(
        'Lower perplexity is better. "units removed" is the fraction removed of the parameters of heads and channels; '
        "embeddings and norms are always kept, so the total shrinks by less. The search runs forward passes only, and "
        "the recovery is a training."
    )
    console.print(
        f"The searched model is in {searched}. Load it with transformers, or read {searched / 'README.md'} first."
    )


if __name__ == "__main__":
    main()
