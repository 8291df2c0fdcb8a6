"""pgprune eval: perplexity, accuracy on tasks, speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, Limit, Quiet, examples, model_names, progress_of
from pgprune_cli.cli.tables import print_measured
from pgprune_cli.errors import UserError
from pgprune_cli.model.source import find_local
from pgprune_cli.run.layout import is_run, refuse_unfinished, runs_folder

EXAMPLES = examples(
    "eval runs/smollm2-135m-30",
    "eval models/smollm2-135m-30 --ppl wikitext2 --ppl mine=texts.jsonl --baseline models/smollm2-135m",
    "eval models/smollm2-135m-30 --tasks hellaswag,piqa",
    "eval models/smollm2-135m-30 --speed",
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
            "[default: as the recipe of a RUN or of an export says, or wikitext2; none with --speed or --tasks]",
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
    max_items: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N items of each task.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens per second and memory, beside the base.")
    ] = False,
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Another model to measure the same way; repeatable.",
            autocompletion=model_names,
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Load in this dtype, not the stored one.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 …  [default: a GPU where there is one]")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, accuracy on tasks and speed. MODEL is a dense model, an exported one or a run directory."""
    if dtype not in (None, "auto", "float32", "float16", "bfloat16"):
        raise UserError(f"--dtype {dtype}: expected auto, float32, float16 or bfloat16")
    for name in [model, *(baselines or [])]:  # before seconds go by in imports
        if is_run(Path(name)):
            refuse_unfinished(Path(name))
            if speed:
                raise UserError(f"{name}: speed is measured on an exported model; run `pgprune export {name}` first")
        elif runs_folder() in Path(name).parents and not Path(name).exists():
            refuse_unfinished(Path(name))
        else:
            find_local(name)
    from pgprune_cli.data.corpora import check_corpus
    from pgprune_cli.jobs.evaluate import Corpus, evaluate, measure_speed, open_target, remember
    from pgprune_cli.jobs.tasks import load_tasks, measure_tasks, names_of

    asked = [Corpus.parse(option) for option in ppl or ()]
    for corpus in asked:  # before a model is loaded
        check_corpus(corpus.text)
    loaded = load_tasks(names_of(tasks), progress_of(quiet)) if tasks is not None else None
    as_recipe = not (asked or speed or loaded)
    targets = [open_target(model, dtype, device, progress_of(quiet), as_recipe)]
    wanted = targets[0].evaluation
    corpora = Corpus.of(wanted) if as_recipe else asked
    seqlens = seqlen or wanted.seqlen
    others = list(baselines or [])
    base = targets[0].base
    if speed and base is not None and base not in others:
        others.append(base)
    targets += [open_target(name, dtype, device, progress_of(quiet)) for name in others]
    results = [evaluate(target, corpora, seqlens, limit, progress_of(quiet)) for target in targets]
    if loaded:
        for target, result in zip(targets, results, strict=True):
            result["tasks"] = measure_tasks(target, loaded, max_items, progress_of(quiet))
    if speed:
        for result, measured in zip(results, measure_speed(targets), strict=True):
            result["speed"] = measured
    for target, result in zip(targets, results, strict=True):
        if (corpora or loaded) and limit is None and max_items is None:
            remember(target, result)
    if as_json:
        print(json.dumps(results[0] | ({"baselines": results[1:]} if results[1:] else {})))
    else:
        print_measured(results)
