"""Compare estimators: how far each gets with the same number of forward passes, over several seeds.

    python scripts/bench/estimators.py RECIPE --out DIR --ppl wikitext2=FILE [--seeds 0 1 2] [--max-windows 256]

`paper` and `rloo` sample every unit independently, `widths` samples the widths of the layers. All get the same text,
the same number of forward passes and a repair at the end, which keeps the units that `paper` and `rloo` chose. A line
of the plot is the perplexity seen during the search; the dot at its end is the decision after the repair.
DIR holds one run per estimator and seed; finished runs are kept and interrupted ones resume. All directories
`DIR/NAME/seed-N` are then read, including those from other versions of pgprune. The table goes to stdout and
`estimators.md`, the plot to `estimators.svg` (needs matplotlib: pip install -e '.[dev]').
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from pgprune_cli.jobs.evaluation_request import Corpus
from pgprune_cli.jobs.perplexity import measure_perplexity
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.targets import open_target
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import METRICS_FILE
from pgprune_cli.storage.records import read_json, write_json

UNITS = ["search.policy=units", "search.masks_per_step=2", "search.evaluate_every=8"]
ESTIMATORS = {
    "paper": [*UNITS, "search.estimator=paper"],
    "rloo": [*UNITS, "search.estimator=rloo"],
    "widths": [
        "search.evaluate_every=1"
    ],  # 16 masks per step, so all are evaluated after the same number of forward passes
}
MEASURED = "bench.json"


def curve(run: Path) -> list[tuple[int, float]]:
    """Return (forward passes so far, held-out perplexity of the hard mask) for each evaluation during the search."""
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [
        (row["step"] * len(row["losses"]), math.exp(row["heldout_loss"]))
        for row in rows
        if row["heldout_loss"] is not None
    ]


def measure(run: Path, corpus: Corpus, limit: int) -> dict[str, Any]:
    """Return the perplexity of a finished run, read from its file if it was measured on the same text before."""
    record, question = run / MEASURED, {"corpus": corpus.text, "limit": limit}
    measured = read_json(record) if record.exists() else {}
    if {key: measured.get(key) for key in question} != question:
        decision = Decision.load(run)
        cell = measure_perplexity(open_target(str(run)), [corpus], [128], max_windows=limit)[0]
        measured = question | {
            "ppl": cell["ppl"],
            "heldout": decision.heldout_loss,
            "forward_passes": decision.forward_passes,
        }
        write_json(record, measured)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ppl", type=Corpus.parse, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-windows", type=int, default=256)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    for seed in options.seeds:
        for name, overrides in ESTIMATORS.items():
            recipe = load(find(options.recipe), [*options.set, *overrides, f"seed={seed}"])
            search(recipe, options.out / name / f"seed-{seed}")

    runs = sorted(record.parent for record in options.out.glob("*/seed-*/decision.json"))
    names = sorted({run.parent.name for run in runs})
    lines = [
        f"| estimator | forward passes | {options.ppl.name} perplexity: mean (each seed) | held-out loss, nats/token |",
        "|---|---|---|---|",
    ]
    for name in names:
        values = [measure(run, options.ppl, options.max_windows) for run in runs if run.parent.name == name]
        per_seed = ", ".join(f"{value['ppl']:.1f}" for value in values)
        held = ", ".join(f"{value['heldout']:.3f}" for value in values)
        mean = statistics.fmean(value["ppl"] for value in values)
        lines.append(f"| `{name}` | {values[0]['forward_passes']:.0f} | {mean:.1f} ({per_seed}) | {held} |")
    table = "\n".join(lines) + "\n"
    print(table)
    (options.out / "estimators.md").write_text(table)
    plot(runs, names, options.out / "estimators.svg")


def plot(runs: list[Path], names: list[str], target: Path) -> None:
    """Draw the held-out perplexity of every run over its forward passes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    colours = dict(zip(names, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for run in runs:
        name = run.parent.name
        forward_passes, perplexities = zip(*curve(run), strict=True)
        label = name if run == next(first for first in runs if first.parent.name == name) else None
        axes.plot(forward_passes, perplexities, color=colours[name], alpha=0.8, linewidth=1.4, label=label)
        repaired = math.exp(Decision.load(run).heldout_loss or math.inf)
        axes.plot(forward_passes[-1:], [repaired], "o", color=colours[name], markersize=5)
    axes.set(xlabel="forward passes of the search", ylabel="held-out perplexity of the hard mask", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False
    )  # above the axes, where it hides no line
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
