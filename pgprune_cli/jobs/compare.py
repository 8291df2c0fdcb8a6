"""compare: the paper's tables on the user's model: other methods, and what metric, start, allocation and repair bring.

Every variant is the recipe with a few keys changed, run once for each seed in a directory of its own. A run that is
finished and measured is not repeated, one that was stopped goes on: `compare` is the same command until it is done.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.console.suggest import nearest
from pgprune_cli.data.corpora import text_identity
from pgprune_cli.errors import UserError
from pgprune_cli.jobs.evaluate import Corpus, evaluate, open_target
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.layout import COMPARISON_RECORD, COMPARISON_TABLE, MEASURED_FILE, SCORES_FILE
from pgprune_cli.run.lock import locked
from pgprune_cli.run.resume import refuse_other_recipe
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import read_record, write_record


@dataclass(frozen=True)
class Variant:
    """One row of the table: its name (a directory too), what it shows, and the recipe it runs."""

    name: str
    shows: str
    recipe: Recipe
    seeded: bool
    """Whether another seed gives another result: without a search and a random metric it does not."""

    def seeds(self, asked: Sequence[int]) -> Sequence[int]:
        """Those it is run with."""
        return asked if self.seeded else asked[:1]


@dataclass(frozen=True)
class Settings:
    """What a model is measured on: rows that differ in it cannot stand in one table.

    texts: of each corpus in their order [name, digest of where its text comes from, of a file its content]; dtype: of
    the dense model.
    """

    texts: list[list[str]]
    seqlen: list[int]
    dtype: str
    limit: int | None

    @classmethod
    def of(cls, recipe: Recipe, limit: int | None) -> Settings:
        """Raises UserError for a text that is not there."""
        texts = []
        for corpus in Corpus.of(recipe.evaluation):
            identity = text_identity(corpus.text, "evaluation")
            texts.append([corpus.name, hashlib.sha256(identity.encode()).hexdigest()])
        return cls(texts, list(recipe.evaluation.seqlen), recipe.dtype, limit)

    def read(self, record: Path) -> dict[str, Any]:
        """The row that was measured, of its record. Raises UserError where other settings gave it."""
        measured = read_record(record)
        before = measured.pop("settings", {})  # of before they were recorded, only the limit is known
        for key, value in asdict(self).items():
            was = measured.get("limit") if key == "limit" else before.get(key, value)
            if was != value:
                raise UserError(f"{record}: measured with {_differs(key, was, value)}; give the same, or another --out")
        return measured

    def write(self, record: Path, measured: dict[str, Any]) -> None:
        settings = asdict(self)
        write_record(record, measured | {"limit": settings.pop("limit"), "settings": settings})


def _differs(key: str, was: Any, now: Any) -> str:
    if key == "limit":
        return f"--max-windows {was}"
    if key == "dtype":
        return f"dtype {was}, not {now}"
    if key == "seqlen":
        return f"evaluation.seqlen {was}, not {now}"
    names = [[name for name, _ in texts] for texts in (was, now)]
    if names[0] == names[1]:
        return f"another text of {next(before[0] for before, after in zip(was, now, strict=True) if before != after)}"
    return "evaluation.corpora [{}], not [{}]".format(*map(", ".join, names))


def variants_of(recipe: Recipe) -> list[Variant]:
    """The rows for a recipe: the methods that it does not use itself, then from its metric alone to all of it."""
    plain = replace(recipe, repair=replace(recipe.repair, method="none"))
    units = replace(recipe.search, policy="units", masks_per_step=2, estimator="paper")
    layers = replace(recipe.search, policy="widths")
    nothing = replace(units, forward_passes=0)

    def of(base: Recipe, settings: Any, metric: Any = recipe.scores.metric, scope: Any = None) -> Recipe:
        budget = replace(base.budget, scope=scope or base.budget.scope)
        return replace(base, search=settings, scores=replace(base.scores, metric=metric), budget=budget)

    def method(name: str, shows: str, metric: str, base: Recipe = plain) -> list[Variant]:
        """A method of the field that only scores, with the same width in every layer and with widths as they come."""
        seeded = metric == "random"
        return [
            Variant(f"{name}-uniform", f"{shows}, all layers alike", of(base, nothing, metric, "per-layer"), seeded),
            Variant(name, f"{shows}, widths as they come", of(base, nothing, metric), seeded),
        ]

    with_bias = replace(recipe, repair=replace(recipe.repair, method="bias"))
    updated = replace(recipe, repair=replace(recipe.repair, method="least-squares"))
    methods = [
        *method("random", "a random choice", "random"),
        *method("magnitude", "sum of squared weights", "magnitude"),
        *method("wanda-sp", "Wanda-sp", "wanda-sp"),
        *method("flap", "FLAP with its bias", "flap", with_bias),
        *method("llm-pruner", "LLM-Pruner's Taylor scores, with a backward pass", "taylor"),
        *method("sparsegpt", "SparseGPT on units, with its updates", "obs", updated),
    ]
    metric = recipe.scores.metric
    ablation = [
        Variant("metric-uniform", f"{metric} only, all layers alike", of(plain, nothing, scope="per-layer"), False),
        Variant("metric", f"{metric} only, widths as they come", of(plain, nothing), False),
        Variant("metric-uniform-repaired", "metric-uniform, repaired", of(recipe, nothing, scope="per-layer"), False),
        Variant("metric-repaired", "metric, repaired", of(recipe, nothing), False),
        Variant(
            "error-widths-repaired",
            "widths by repaired error alone",
            of(recipe, replace(layers, forward_passes=0)),
            False,
        ),
        Variant("random-start", "the paper's search from a random start", of(plain, units, "random"), True),
        Variant("uniform-start", "the paper's search from a uniform start", of(plain, units, "uniform"), True),
        Variant("metric-start", "the paper's search from the metric", of(plain, units), True),
        Variant("metric-start-repaired", "metric-start, repaired", of(recipe, units), True),
        Variant("widths", "search over widths, without repair", of(plain, layers), True),
        Variant("widths-repaired", "search over widths, with repair", of(recipe, layers), True),
    ]
    known = [variant.recipe for variant in ablation]  # of the metrics, the recipe's own has its rows there
    return [*(variant for variant in methods if variant.recipe not in known), *ablation]


def _wanted(recipe: Recipe, only: Sequence[str]) -> list[Variant]:
    variants = variants_of(recipe)
    if unknown := sorted(set(only) - {variant.name for variant in variants}):
        names = [variant.name for variant in variants]
        meant = nearest(unknown[0], names, most=3) or ":"
        raise UserError(f"--only {unknown[0]}: no such variant{meant} expected one of {', '.join(names)}")
    return [variant for variant in variants if not only or variant.name in only]


def runs_of(recipe: Recipe, out: Path, seeds: Sequence[int], only: Sequence[str]) -> list[tuple[Path, int]]:
    """The run directories of a comparison, each with the steps of its search. Raises UserError as `compare` does."""
    return [
        (_directory(variant, seed, out), variant.recipe.search.steps)
        for variant in _wanted(recipe, only)
        for seed in variant.seeds(seeds)
    ]


def compare(
    recipe: Recipe, out: Path, seeds: Sequence[int], only: Sequence[str], limit: int | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Runs every variant (or those named in `only`) for every seed and writes the table into `out` after each.

    `limit`: as `evaluate` takes it. Returns the object that `--json` prints. Raises UserError for a name that is no
    variant's, for texts that are not there or for an `out` of another comparison, and what `search` and `evaluate`
    raise. Rows that an earlier call measured stay in the table.
    """
    variants, wanted = variants_of(recipe), _wanted(recipe, only)
    settings = Settings.of(recipe, limit)  # its texts are looked for before hours of search
    table: dict[str, Any] = {"model": recipe.model, "sparsity": recipe.budget.sparsity, "limit": limit}
    with locked(out):
        rows = _earlier_rows(recipe, out, variants) | {"dense": _dense(recipe, out, settings, progress)}
        for variant in wanted:
            runs = []
            for seed in variant.seeds(seeds):
                runs.append(_one(variant, replace(variant.recipe, seed=seed), out, settings, progress))
                rows[variant.name] = {"name": variant.name, "shows": variant.shows, "runs": runs, "mean": _mean(runs)}
                table["rows"] = [rows[name] for name in ("dense", *(each.name for each in variants)) if name in rows]
                write_record(out / COMPARISON_RECORD, table)
                write_bytes(out / COMPARISON_TABLE, markdown(table).encode())
    return table


def _earlier_rows(recipe: Recipe, out: Path, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """The rows that earlier calls put into the table in `out`, by name. Raises UserError for another comparison's."""
    if not (out / COMPARISON_RECORD).exists():
        return {}
    before = read_record(out / COMPARISON_RECORD)
    for key, value in {"model": recipe.model, "sparsity": recipe.budget.sparsity}.items():
        if before.get(key) != value:
            raise UserError(
                f"{out / COMPARISON_RECORD}: its {key} is {before.get(key)}, not {value}; give another --out"
            )
    rows = {row["name"]: row for row in before["rows"]}
    for variant in variants:
        for run in rows.get(variant.name, {"runs": []})["runs"]:
            refuse_other_recipe(_directory(variant, run["seed"], out), replace(variant.recipe, seed=run["seed"]))
    return rows


def _directory(variant: Variant, seed: int, out: Path) -> Path:
    return out / variant.name / f"seed-{seed}"


def _dense(recipe: Recipe, out: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    record = out / "dense" / MEASURED_FILE
    if not record.exists():
        target = replace(open_target(recipe.model, recipe.dtype, recipe.device, progress), evaluation=recipe.evaluation)
        settings.write(record, _perplexities(target, recipe, settings.limit, progress))
    run = settings.read(record) | {"seed": None, "forward_passes": 0, "calibration_forward_passes": 0, "seconds": 0.0}
    return {"name": "dense", "shows": "the model as it is", "runs": [run], "mean": _mean([run])}


def _one(variant: Variant, recipe: Recipe, out: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """One variant with one seed: what it measured, from its directory where it is done already."""
    run = _directory(variant, recipe.seed, out)
    record = run / MEASURED_FILE
    if record.exists():
        refuse_other_recipe(run, recipe)
        return settings.read(record)
    progress.say(f"{variant.name}, seed {recipe.seed}: {variant.shows}")
    _share_scores(recipe, run, out, progress)
    before, began = _seconds_so_far(run), time.monotonic()
    decision = search(recipe, run, progress=progress)
    seconds = before + time.monotonic() - began
    target = open_target(str(run), None, None, progress)
    measured = _perplexities(target, recipe, settings.limit, progress)
    spent = {
        "forward_passes": decision.forward_passes,
        "calibration_forward_passes": decision.calibration_forward_passes,
    }
    settings.write(record, measured | spent | {"seconds": seconds, "seed": recipe.seed})
    return settings.read(record)


def _share_scores(recipe: Recipe, run: Path, out: Path, progress: Progress) -> None:
    """Scores of one metric serve all variants that start from it; those of a random one belong to a seed."""
    if (run / SCORES_FILE).exists():
        return
    metric = recipe.scores.metric
    kept = out / "scores" / (f"{metric}-{recipe.seed}" if metric == "random" else metric)
    if not (kept / SCORES_FILE).exists():
        init_scores(recipe, kept, progress=progress)
    write_bytes(run / SCORES_FILE, (kept / SCORES_FILE).read_bytes())


def _seconds_so_far(run: Path) -> float:
    """Of a search that an earlier call began."""
    checkpoint = latest_checkpoint(run)
    return checkpoint.seconds if checkpoint else 0.0


def _perplexities(target: Any, recipe: Recipe, limit: int | None, progress: Progress) -> dict[str, Any]:
    result = evaluate(target, Corpus.of(recipe.evaluation), recipe.evaluation.seqlen, limit, progress)
    return {"parameters": result["parameters"], "perplexity": result["perplexity"]}


def _mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    columns = zip(*(run["perplexity"] for run in runs), strict=True)
    return {
        "perplexity": [cells[0] | {"ppl": statistics.fmean(cell["ppl"] for cell in cells)} for cells in columns],
        "forward_passes": statistics.fmean(run["forward_passes"] for run in runs),
        "calibration_forward_passes": statistics.fmean(run["calibration_forward_passes"] for run in runs),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def cells(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table as headings and rows of text: a row for each variant, the mean first, its seeds in brackets."""
    lengths = [f"{cell['corpus']} PPL, {cell['seqlen']} tokens" for cell in table["rows"][0]["mean"]["perplexity"]]
    rows = []
    for row in table["rows"]:
        line = [row["name"], row["shows"]]
        for place, cell in enumerate(row["mean"]["perplexity"]):
            each = [f"{run['perplexity'][place]['ppl']:,.2f}" for run in row["runs"]]
            line.append(f"{cell['ppl']:,.2f}" + (f" ({', '.join(each)})" if len(each) > 1 else ""))
        mean = row["mean"]
        rows.append(
            [
                *line,
                f"{mean['forward_passes']:.0f} + {mean['calibration_forward_passes']:.0f}",
                f"{mean['seconds']:,.0f}",
            ]
        )
    return ["variant", "what it shows", *lengths, "forward passes: search + calibration", "seconds"], rows


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    headings, rows = cells(table)
    lines = [f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *rows]]
    return f"{table['model']}, sparsity {table['sparsity']}\n\n" + "\n".join(lines) + "\n"
