"""make demo: the whole job on the model that comes with the package, and a table of what came out.

Runs the four commands as a user would: init-scores, search, export, eval; and once more with no search steps, so that
the same budget met by the metric alone stands beside it.
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
    """Runs one command, its progress passing through; returns what it printed. Exits as the command did."""
    print(f"\n$ pgprune {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "pgprune_cli", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def pruned(name: str, *overrides: str) -> tuple[Path, dict]:
    """Scores, searches and exports: where the model lies, and what search said of it."""
    run, model = RUNS / name, MODELS / name
    for leftover in (run, model):  # a demo starts from nothing, or it would show an earlier one's result
        shutil.rmtree(leftover, ignore_errors=True)
    pgprune("init-scores", RECIPE, "--out", str(run))
    decision = json.loads(pgprune("search", RECIPE, "--out", str(run), "--json", *overrides))
    pgprune("export", str(run), "--out", str(model))
    return model, decision


def main() -> None:
    alone = ("search.forward_passes=0", "search.policy=units", "repair.method=none")
    metric_only, metric_decision = pruned("demo-metric-only", *(word for key in alone for word in ("--set", key)))
    searched, decision = pruned("demo-searched")
    baselines = [argument for other in (metric_only, "demo") for argument in ("--baseline", str(other))]
    measured = json.loads(
        pgprune("eval", str(searched), "--ppl", "demo", "--seqlen", "128", "--speed", "--json", *baselines)
    )
    without, dense = measured["baselines"]

    table = Table(title="The demo model, pruned")
    for heading in ("", "sparsity", "parameters", "perplexity", "prefill tokens/s", "decode tokens/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [("dense", 0.0, dense), ("metric only", metric_decision["sparsity"], without)]
    for name, sparsity, result in [*rows, ("searched", decision["sparsity"], measured)]:
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
        "Sparsity is of what can go, heads and FFN channels; embeddings and norms stay, so of all parameters fewer go."
    )
    console.print(
        f"The searched model lies in {searched}; load it with transformers, or look at {searched / 'README.md'}"
    )


if __name__ == "__main__":
    main()
