"""compare: the paper's tables on your model: other methods, and what metric, start, widths and repair contribute.

Every variant is the recipe with a few keys changed, run once per seed in a directory of its own. Finished runs are not
repeated and interrupted ones resume, so the same command can be given until the table is complete. Scores and width
tables are computed once for all variants that need the same ones.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pgprune_cli.console.markdown import markdown_table
from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.data.corpora import text_identity
from pgprune_cli.errors import UserError
from pgprune_cli.jobs.evaluation_request import Corpus
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.memory import SEARCH_CHECKS
from pgprune_cli.jobs.perplexity import measure_perplexity
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.targets import Target, open_target
from pgprune_cli.jobs.variants import Variant, select_variants, variants_of
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.contradictions import refuse_contradictions
from pgprune_cli.recipe.schema import FITTED, Bos, Recipe
from pgprune_cli.recipe.strict_yaml import to_yaml
from pgprune_cli.run.evaluation import perplexity_name
from pgprune_cli.run.layout import (
    COMPARISON_RECORD,
    COMPARISON_TABLE,
    MEASURED_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    TABLES_FOLDER,
)
from pgprune_cli.run.lock import locked, refuse_unusable
from pgprune_cli.run.resume import refuse_other_recipe
from pgprune_cli.run.settled import settled
from pgprune_cli.search.checks import ESTIMATE_CHECKS, run_checks
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.storage.atomic import make_directory, write_bytes
from pgprune_cli.storage.records import json_digest, read_record, write_record


@dataclass(frozen=True)
class EvaluationConditions:
    """What a model is evaluated on. Only rows with the same conditions can stand in one table.

    fingerprint: of the dense model; texts: for every corpus in order [name, digest of the text's identity]; seqlen:
    window lengths; bos: the recipe's setting; dtype: of the dense model; max_windows: as `evaluate` takes it.
    """

    fingerprint: str
    texts: list[list[str]]
    seqlen: list[int]
    bos: Bos
    dtype: str
    max_windows: int | None

    @classmethod
    def of(cls, recipe: Recipe, max_windows: int | None) -> EvaluationConditions:
        """Return the conditions of a recipe. Raises UserError if a text or the model does not exist."""
        texts = []
        for corpus in Corpus.of(recipe.evaluation):
            identity = text_identity(corpus.text, "evaluation")
            texts.append([corpus.name, hashlib.sha256(identity.encode()).hexdigest()])
        evaluation = recipe.evaluation
        fingerprint = resolve(recipe.model).fingerprint()
        return cls(fingerprint, texts, list(evaluation.seqlen), evaluation.bos, recipe.dtype, max_windows)

    def write(self, path: Path, measurements: dict[str, Any]) -> None:
        """Write measurements together with these conditions."""
        write_record(path, measurements | {"conditions": asdict(self)})

    def read(self, path: Path) -> dict[str, Any]:
        """Return the measurements in a record. Raises UserError if it is damaged or has other conditions."""
        measurements = read_record(path)
        current, recorded = asdict(self), measurements.pop("conditions", None)
        if not isinstance(recorded, dict) or recorded.keys() != current.keys():
            raise UserError(f"{path}: damaged, the evaluation conditions are missing. Delete it to evaluate again.")
        for key, value in current.items():
            if recorded[key] != value:
                difference = _difference(key, recorded[key], value)
                same = "files" if key == "fingerprint" else "settings"
                raise UserError(f"{path}: measured {difference}. Use the same {same}, or another --out.")
        return measurements | {"max_windows": self.max_windows}


def _difference(key: str, recorded: Any, current: Any) -> str:
    """Describe how two values of a condition differ."""
    if key == "fingerprint":
        return "before the model's files changed"
    if key == "max_windows":
        before, now = ("without --max-windows" if n is None else f"with --max-windows {n}" for n in (recorded, current))
        return f"{before}, not {now}"
    if key == "dtype":
        return f"with dtype {recorded}, not {current}"
    if key == "seqlen":
        return f"with evaluation.seqlen {recorded}, not {current}"
    if key == "bos":
        return f"with evaluation.bos {to_yaml(recorded)}, not {to_yaml(current)}"
    old_names, new_names = ([name for name, _ in texts] for texts in (recorded, current))
    if old_names == new_names:
        changed = next(old[0] for old, new in zip(recorded, current, strict=True) if old != new)
        return f"on another version of the text {changed}"
    return f"on evaluation.corpora [{', '.join(old_names)}], not [{', '.join(new_names)}]"


def compare(
    recipe: Recipe,
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    only: Sequence[str] = (),
    max_windows: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the variants for every seed, write the table into `out` after each run, and return it as `--json` prints it.

    only: names of the variants to run; the others keep the rows that earlier calls measured. max_windows: as
    `evaluate` takes it.

    Raises UserError for an unknown variant, a missing text, or an `out` that holds another comparison, and whatever
    `search` and `evaluate` raise.
    """
    refuse_unusable(out)
    recipe = settled(recipe)
    variants, selected = variants_of(recipe), select_variants(recipe, only)
    for variant in selected:
        refuse_contradictions(variant.recipe, f"variant {variant.name}")
        run_checks(Preparation(variant.recipe), ESTIMATE_CHECKS)
    conditions = EvaluationConditions.of(recipe, max_windows)  # fails before hours of search if a text is missing
    table: dict[str, Any] = {"model": recipe.model, "sparsity": recipe.budget.sparsity, "max_windows": max_windows}
    with locked(out):
        rows = _earlier_rows(recipe, out, variants) | {"dense": _dense_row(recipe, out, conditions, progress)}
        for variant in selected:
            runs = []
            for seed in variant.seeds(seeds):
                runs.append(_run(variant, replace(variant.recipe, seed=seed), out, conditions, progress))
                rows[variant.name] = {"name": variant.name, "shows": variant.shows, "runs": runs, "mean": _mean(runs)}
                names = ["dense", *(variant.name for variant in variants)]
                table["rows"] = [rows[name] for name in names if name in rows]
                write_record(out / COMPARISON_RECORD, table)
                write_bytes(out / COMPARISON_TABLE, markdown(table).encode())
        shutil.rmtree(out / TABLES_FOLDER, ignore_errors=True)
    return table


def runs_of(recipe: Recipe, out: Path, seeds: Sequence[int], only: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the run directories of a comparison, each with the steps of its search. Raises UserError as `compare`."""
    return [
        (_directory(variant, seed, out), variant.recipe.search.steps)
        for variant in select_variants(recipe, only)
        for seed in variant.seeds(seeds)
    ]


def _directory(variant: Variant, seed: int, out: Path) -> Path:
    return out / variant.name / f"seed-{seed}"


def _earlier_rows(recipe: Recipe, out: Path, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
    """Return the rows that earlier calls wrote, by name. Raises UserError if they belong to another comparison."""
    path = out / COMPARISON_RECORD
    if not path.exists():
        return {}
    record = read_record(path)
    asked = {"model": ("model", recipe.model), "sparsity": ("budget.sparsity", recipe.budget.sparsity)}
    for name, (key, value) in asked.items():
        if record.get(name) != value:
            raise UserError(f"{path}: its {key} is {record.get(name)}, not {value}. Use another --out.")
    rows = {row["name"]: row for row in record["rows"]}
    for variant in variants:
        for run in rows.get(variant.name, {"runs": []})["runs"]:
            refuse_other_recipe(_directory(variant, run["seed"], out), replace(variant.recipe, seed=run["seed"]))
    return rows


def _dense_row(recipe: Recipe, out: Path, conditions: EvaluationConditions, progress: Progress) -> dict[str, Any]:
    """Return the row of the unpruned model, and evaluate it if no earlier call did."""
    path = out / "dense" / MEASURED_FILE
    if not path.exists():
        run_checks(Preparation(recipe, progress=progress), SEARCH_CHECKS)  # before the evaluation, which takes minutes
        target = open_target(
            recipe.model, dtype=recipe.dtype, device=recipe.device, bos=recipe.evaluation.bos, progress=progress
        )
        conditions.write(path, _measure(target, recipe, conditions, progress))
    run = conditions.read(path) | {"seed": None, "forward_passes": 0, "calibration_forward_passes": 0, "seconds": 0.0}
    return {"name": "dense", "shows": "the unpruned model", "runs": [run], "mean": _mean([run])}


def _run(
    variant: Variant, recipe: Recipe, out: Path, conditions: EvaluationConditions, progress: Progress
) -> dict[str, Any]:
    """Search and evaluate one variant with one seed, or return the measurements if that is done already."""
    run = _directory(variant, recipe.seed, out)
    path = run / MEASURED_FILE
    if path.exists():
        refuse_other_recipe(run, recipe)
        return conditions.read(path)
    progress.say(f"{variant.name}, seed {recipe.seed}: {variant.shows}")
    _share_scores(recipe, run, out, progress)
    decision = search(recipe, run, shared_widths=_shared_widths(recipe, out), progress=progress)
    target = open_target(str(run), bos=recipe.evaluation.bos, progress=progress)
    measurements = _measure(target, recipe, conditions, progress) | {
        "forward_passes": decision.forward_passes,
        "calibration_forward_passes": decision.calibration_forward_passes,
        "seconds": sum(decision.phases.values()),
        "seed": recipe.seed,
    }
    conditions.write(path, measurements)
    return conditions.read(path)


def _share_scores(recipe: Recipe, run: Path, out: Path, progress: Progress) -> None:
    """Copy the scores into a run. Variants with the same settings of them share them."""
    if (run / SCORES_FILE).exists():
        return
    shared = out / SCORES_FOLDER / _name_of_scores(recipe)
    if not (shared / SCORES_FILE).exists():
        init_scores(recipe, shared, progress=progress)
    write_bytes(run / SCORES_FILE, (shared / SCORES_FILE).read_bytes())


def _name_of_scores(recipe: Recipe) -> str:
    """Return a name that says the metric, with a digest of what its scores depend on: the seed if they are random."""
    metric = recipe.scores.metric
    seed = recipe.seed if metric == "random" else None
    settings = [asdict(recipe.scores), asdict(recipe.calibration), recipe.dtype, recipe.weight_format, seed]
    return f"{metric}-{json_digest(settings)[:8]}"


def _shared_widths(recipe: Recipe, out: Path) -> Path | None:
    """Return the directory of the width table that a run shares: one table has repaired projections, one has none.

    None for a unit search. A search that finds the table of another one solves its own in its place.
    """
    if recipe.search.policy == "units":
        return None
    folder = out / TABLES_FOLDER / ("repaired" if recipe.repair.method in FITTED else "unrepaired")
    make_directory(folder)
    return folder


def _measure(target: Target, recipe: Recipe, conditions: EvaluationConditions, progress: Progress) -> dict[str, Any]:
    """Return the number of parameters and the perplexities of a model."""
    corpora, seqlens = Corpus.of(recipe.evaluation), recipe.evaluation.seqlen
    rows = measure_perplexity(target, corpora, seqlens, max_windows=conditions.max_windows, progress=progress)
    return {"parameters": target.parameters, "perplexity": rows}


def _mean(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Average the measurements over the seeds."""
    columns = zip(*(run["perplexity"] for run in runs), strict=True)
    return {
        "perplexity": [cells[0] | {"ppl": statistics.fmean(cell["ppl"] for cell in cells)} for cells in columns],
        "forward_passes": statistics.fmean(run["forward_passes"] for run in runs),
        "calibration_forward_passes": statistics.fmean(run["calibration_forward_passes"] for run in runs),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def cells(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and a row of text for each variant: its mean, ± the standard deviation over several seeds."""
    perplexities = [perplexity_name(cell) for cell in table["rows"][0]["mean"]["perplexity"]]
    rows = []
    for row in table["rows"]:
        texts = [row["name"], row["shows"]]
        for index, cell in enumerate(row["mean"]["perplexity"]):
            seeds = [run["perplexity"][index]["ppl"] for run in row["runs"]]
            texts.append(f"{cell['ppl']:,.2f}" + (f" ± {statistics.stdev(seeds):,.2f}" if len(seeds) > 1 else ""))
        mean = row["mean"]
        texts.append(f"{mean['forward_passes']:.0f} + {mean['calibration_forward_passes']:.0f}")
        texts.append(f"{mean['seconds']:,.0f}")
        rows.append(texts)
    return ["variant", "what it shows", *perplexities, "forward passes: search + calibration", "seconds"], rows


def markdown(table: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    return f"{table['model']}, sparsity {table['sparsity']}\n\n{markdown_table(*cells(table))}\n"
