"""The command line: a verb is a few lines. Heavy imports stay inside the functions, so that --help is quick."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from pgprune_cli import __version__, signals
from pgprune_cli.distributed import of_environment
from pgprune_cli.errors import ExitCode, RunError, UserError, advice_on
from pgprune_cli.options import (
    AsJson,
    Limit,
    Out,
    Quiet,
    RecipeName,
    Set,
    examples,
    metric_names,
    model_names,
    recipe_names,
    run_names,
)
from pgprune_cli.recipe_verbs import recipes_app
from pgprune_cli.run_files import runs_folder
from pgprune_cli.stderr import STDERR
from pgprune_cli.tables import export_line, grid, print_estimate, print_measured, print_plan, print_result
from pgprune_cli.usage import usage_fault

if TYPE_CHECKING:
    from pgprune_cli.recipe import Recipe

app = typer.Typer(
    help="Make a language model structurally smaller: learn which heads and FFN channels to keep, forward passes only.",
    epilog=examples("search demo", "export runs/demo", "eval models/demo --ppl demo --seqlen 128"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipes_app, name="recipes")

Format = Literal["hf", "gguf", "mlx"]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pgprune {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if of_environment().world > 1 and context.invoked_subcommand != "search":
        raise UserError(f"{context.invoked_subcommand} is the work of one process; torchrun is for search")


@app.command(epilog=examples("init-scores smollm2-135m-30", "init-scores demo --metric magnitude"))
def init_scores(
    recipe: RecipeName,
    out: Out = None,
    overrides: Set = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Saliency metric, instead of the recipe's.", autocompletion=metric_names),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score every unit of the recipe's model with a saliency metric, the search's start."""
    given = [*(overrides or []), *([f"saliency.metric={metric}"] if metric else [])]
    loaded, run = _open(recipe, out, given)
    from pgprune_cli.jobs.init_scores import init_scores
    from pgprune_cli.run_files import SCORES

    scores = init_scores(loaded, run, quiet)
    result = {"run": str(run), "scores": str(run / SCORES), "metric": scores.metric}
    print_result(result, as_json, f"{run / SCORES}: {scores.metric} of {loaded.model}")


@app.command(
    epilog=examples(
        "search demo",
        "search mine.yaml --out runs/mine",
        "search llama2-7b-50 --set model=/data/my-llama --set budget.sparsity=0.4",
    )
)
def search(
    recipe: RecipeName,
    out: Out = None,
    overrides: Set = None,
    log: Annotated[
        Literal["tensorboard", "trackio", "wandb"] | None,
        typer.Option("--log", help="Tell a tracker every step, too; an extra of the same name installs it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load nothing; print what memory, forward passes and time it would take.")
    ] = False,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Where the newest checkpoint is damaged, go on from the one before.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search which units to keep. Goes on by itself where an earlier call was stopped."""
    loaded, run = _open(recipe, out, overrides or [])
    if dry_run:
        from pgprune_cli.jobs.estimate import estimate

        print_estimate(estimate(loaded, quiet), as_json)
        return
    from pgprune_cli.jobs.search import search
    from pgprune_cli.run_files import MASKS

    with _resumable():
        decision = search(loaded, run, quiet, skip_damaged, log)
    if not of_environment().writer:
        return
    result = {
        "run": str(run),
        "decision": str(run / MASKS),
        "sparsity": decision.sparsity,
        "steps": decision.steps,
        "forwards": decision.forwards,
        "heldout_loss": decision.heldout_loss,
    }
    loss = "not finite" if decision.heldout_loss is None else f"{decision.heldout_loss:.4f} nats per token"
    print_result(
        result,
        as_json,
        f"{run / MASKS}: sparsity {decision.sparsity:.4f} after {decision.steps} steps, "
        f"{decision.forwards} forward passes; held-out loss {loss}",
    )


@app.command(
    epilog=examples(
        "export runs/smollm2-135m-30 --dry-run",
        "export runs/smollm2-135m-30 --dtype bfloat16 --ffn-multiple 64",
        "export runs/smollm2-135m-30 --format gguf --dtype q8_0",
    )
)
def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The run directory of a finished search.", autocompletion=run_names),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="The directory to write, new or empty, or the new .gguf file.  [default: models/<run>]",
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: for transformers and what reads its models; gguf: one file for llama.cpp; mlx: for mlx-lm, too.",
        ),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, float16, bfloat16, or q8_0 in GGUF.  [default: the base's]"),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Tensors in one weight file, at most; not for GGUF.  [default: 5GB]"),
    ] = None,
    zero_groups: Annotated[
        bool, typer.Option("--zero-groups", help="A KV group that adds nothing where a layer has none, for vLLM.")
    ] = False,
    kv_multiple: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pad KV groups to a multiple, with zeros; or all of them.")
    ] = 1,
    ffn_multiple: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pad FFN channels to a multiple, with zeros; or all of them.")
    ] = 1,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the Hugging Face hub, too.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; print the shapes and sizes of what would be written.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the smaller model: a directory with its weights, tokenizer, card and decision, or one GGUF file."""
    from pgprune_cli.jobs import export as job
    from pgprune_cli.progress import working
    from pgprune_cli.writers import hub

    options = job.options_of(format, dtype, shard_size, zero_groups, kv_multiple, ffn_multiple)
    out = job.target(run, out, format)
    if push is not None:
        hub.check_name(push)
    if dry_run:
        planned = job.plan(run, options, format)
        print_plan(job.summary(planned, out), job.tensors(planned, out), as_json)
        return
    summary = job.summary(job.export(run, out, options, format, quiet), out)
    line = export_line(summary)
    if push is not None:
        with working(f"uploading {out} to {push}", quiet):
            summary["pushed"] = hub.push(out, push)
        line += f"; {summary['pushed']}"
    print_result(summary, as_json, line)


@app.command(
    name="eval",
    epilog=examples(
        "eval runs/smollm2-135m-30",
        "eval models/smollm2-135m-30 --ppl wikitext2 --ppl mine=texts.jsonl --against models/smollm2-135m",
        "eval models/smollm2-135m-30 --tasks hellaswag,piqa",
        "eval models/smollm2-135m-30 --speed",
    ),
)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model as in recipes, an exported one, or a RUN.", autocompletion=model_names
        ),
    ],
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS",
            help="wikitext2, c4, ptb, demo, a hub name, or NAME=FILE; repeatable.  "
            "[default: as the recipe of a RUN says, or wikitext2; none with --speed or --tasks]",
        ),
    ] = None,
    seqlen: Annotated[
        list[int] | None,
        typer.Option(min=2, metavar="TOKENS", help="Window length in tokens; repeatable.  [default: 128 and 2048]"),
    ] = None,
    limit: Limit = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tasks of the lm-evaluation-harness with commas, such as hellaswag,piqa, or task files (*.yaml).",
        ),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N items of each task.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens per second and memory, beside the base.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL", help="Another model to measure the same way; repeatable.", autocompletion=model_names
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Load in this dtype, not the stored one.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 …  [default: a GPU where there is one]")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, accuracy on tasks and speed of a dense model, an exported one or a run directory."""
    if dtype not in (None, "auto", "float32", "float16", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected auto, float32, float16 or bfloat16")
    from pgprune_cli.jobs.evaluate import Corpus, evaluate, measure_speed, open_target, remember
    from pgprune_cli.jobs.tasks import load_tasks, measure_tasks, names_of

    loaded = load_tasks(names_of(tasks), quiet) if tasks is not None else None
    targets = [open_target(model, dtype, device, quiet)]
    wanted = targets[0].evaluation
    corpora = [Corpus.parse(option) for option in ppl or (() if speed or loaded else wanted.corpora)]
    seqlens = seqlen or wanted.seqlen
    others = list(against or [])
    base = targets[0].base
    if speed and base is not None and base not in others:
        others.append(base)
    targets += [open_target(name, dtype, device, quiet) for name in others]
    results = [evaluate(target, corpora, seqlens, limit, quiet) for target in targets]
    if loaded:
        for target, result in zip(targets, results, strict=True):
            result["tasks"] = measure_tasks(target, loaded, task_limit, quiet)
    if speed:
        for result, measured in zip(results, measure_speed(targets), strict=True):
            result["speed"] = measured
    for target, result in zip(targets, results, strict=True):
        if (corpora or loaded) and limit is None and task_limit is None:
            remember(target, result)
    if as_json:
        print(json.dumps(results[0] | ({"against": results[1:]} if results[1:] else {})))
    else:
        print_measured(results)


@app.command(
    epilog=examples(
        "compare smollm2-135m-30 --seeds 0,1,2 --limit 512",
        "compare smollm2-135m-30 --only metric --only layers-repaired",
    )
)
def compare(
    recipe: RecipeName,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the runs go.  [default: runs/compare/<recipe>, or in $PGPRUNE_RUNS]"
        ),
    ] = None,
    overrides: Set = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Seeds of the variants that search.")] = "0",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT", help="This row only, beside those measured earlier; repeatable.  [default: all]"
        ),
    ] = None,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the paper's tables on the recipe's model: other methods; metric, start, allocation, repair, with and without.

    Long, and resumable: the same command goes on where an earlier call was stopped.
    """
    try:
        numbers = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    except ValueError:
        raise UserError(f"--seeds {seeds}: expected whole numbers with commas, such as 0,1,2") from None
    loaded, run = _open(recipe, out, overrides or [], runs_folder() / "compare")
    from pgprune_cli.jobs.compare import TABLE_MARKDOWN, cells, compare

    with _resumable():
        table = compare(loaded, run, numbers, only or [], limit, quiet)
    if as_json:
        print(json.dumps(table))
        return
    headings, rows = cells(table)
    grid(headings, rows)
    print(f"{run / TABLE_MARKDOWN}")


@app.command(epilog=examples("verify runs/smollm2-135m-30"))
def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Scores, a checkpoint, a decision, a run directory or an exported model."),
    ],
    as_json: AsJson = False,
) -> None:
    """Check that what pgprune wrote is whole. Exit code 1, and a line for every damage, where it is not."""
    from dataclasses import asdict

    from pgprune_cli.jobs.verify import verify

    verdict = verify(path)
    print_result(asdict(verdict), as_json, verdict.text())
    if verdict.faults:
        raise typer.Exit(ExitCode.FAILED)


@app.command(epilog=examples("doctor", "doctor llama2-7b-50"))
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="Check the model and the data of this recipe, too.", autocompletion=recipe_names
        ),
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check Python, packages, devices, memory, disk and the hub, and say what to mend. Exit code 1 for anything."""
    from dataclasses import asdict

    loaded = _open(recipe, None, overrides or [])[0] if recipe else None
    from pgprune_cli.jobs.doctor import doctor

    findings = doctor(loaded)
    rows = [asdict(finding) for finding in findings]
    print_result({"findings": rows}, as_json, "\n".join(finding.text() for finding in findings))
    if any(finding.fix for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


@app.command(
    epilog=examples(
        "report runs/smollm2-135m-30",
        "report runs/smollm2-135m-30 runs/smollm2-135m-50 --out both.html",
    )
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Run directories, finished or still searching.", autocompletion=run_names),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The page.  [default: report.html, in the run or, of several, here]"
        ),
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Write it anew so often, until every run is finished."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about runs: what was done, the losses, theta or widths, and how several compare."""
    from pgprune_cli.jobs import report as job

    page = job.target(runs, out)
    for read in job.report(runs, page, watch):
        states = ", ".join(f"{run.name} {run.progress}" for run in read)
        if watch is not None and not quiet:
            print(f"{page}: {states}", file=sys.stderr, flush=True)
    result = {"report": str(page), "runs": [{"run": str(run.directory), "state": run.progress} for run in read]}
    print_result(result, as_json, f"{page}: {states}")


@app.command(epilog=examples("runs", "runs runs/compare --json"))
def runs(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where to look, also below.  [default: runs, or $PGPRUNE_RUNS]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: how far they have come, what they removed, and what `eval` measured."""
    from pgprune_cli.jobs.runs import cells, runs_in

    rows = runs_in(folder or runs_folder())
    if as_json:
        print(json.dumps({"runs": rows}))
        return
    grid(*cells(rows), texts=5)
    for row in rows:
        if row["fault"]:
            _complain(row["fault"])


def main() -> NoReturn:
    """The `pgprune` program."""
    code: int = ExitCode.OK
    try:
        with _stoppable():
            code = app(prog_name="pgprune", standalone_mode=False) or ExitCode.OK
    except UserError as error:
        _complain(str(error))
        code = ExitCode.BAD_INPUT
    except RunError as error:
        _complain(str(error))
        code = ExitCode.FAILED
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}{advice_on(error)}")
        code = ExitCode.FAILED
    except Exception as error:
        fault = usage_fault(error)
        if fault is None:  # a bug of ours, and its traceback is wanted
            raise
        _complain(fault)
        code = ExitCode.BAD_INPUT
    sys.exit(code)


def _open(name: str, out: Path | None, overrides: list[str], runs: Path | None = None) -> tuple[Recipe, Path]:
    """The recipe, and the run directory it is for, in `runs` if it is not given."""
    from pgprune_cli.recipe_reader import find, load, name_of

    path = find(name)
    return load(path, overrides), out or (runs or runs_folder()) / name_of(path)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals to stop end the program with a word and its exit code, all cleaned up. A search catches its own."""

    def stop(signum: int, _: object) -> NoReturn:
        _complain(signals.WORDS[signal.Signals(signum)])
        raise SystemExit(signals.exit_code(signum))

    before = {signum: signal.signal(signum, stop) for signum in signals.stopping()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _resumable() -> Iterator[None]:
    """Turns a saved stop of a search into its exit code, and says how to go on; after any other stop, too."""
    from pgprune_cli.jobs.search import Interrupted

    alone = of_environment().world == 1
    again = " ".join(["pgprune", *map(_quoted, sys.argv[1:])]) if alone else "the same torchrun command"
    try:
        yield
    except Interrupted as stopped:
        _complain(f"stopped after step {stopped.step}, which is saved; to go on: {again}")
        raise typer.Exit(signals.exit_code(stopped.signum)) from None
    except SystemExit:
        _complain(f"stopped; from what is saved, if anything is yet, this goes on: {again}")
        raise


def _complain(text: str) -> None:
    from pgprune_cli.strict_yaml import one_line

    ranks = of_environment()
    who = "pgprune" if ranks.world == 1 else f"pgprune, rank {ranks.rank}"
    for line in text.splitlines():  # of which parts may come from files, and so what terminals take for commands
        print(f"{who}: {one_line(line)}", file=STDERR)


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


if __name__ == "__main__":
    main()
