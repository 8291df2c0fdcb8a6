"""pgprune eval: measure perplexity, task accuracies and speed."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from pgprune_cli.cli.options import AsJson, BaseModel, MaxWindows, Quiet, examples, model_names, progress_of
from pgprune_cli.cli.tables import print_measured

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
            metavar="MODEL",
            help="A run directory, an exported model, or any model that a recipe can name.",
            autocompletion=model_names,
        ),
    ],
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS",
            help="Measure perplexity on wikitext2, c4, ptb, demo, a hub data set or NAME=FILE. Repeatable.  "
            "[default: the recipe's corpora for a run or an export, otherwise wikitext2; none with --speed or --tasks]",
        ),
    ] = None,
    seqlen: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            metavar="TOKENS",
            help="Window length in tokens. Repeatable.  [default: the recipe's, otherwise 128 and 2048]",
        ),
    ] = None,
    bos: Annotated[
        Literal["auto", "true", "false"] | None,
        typer.Option(
            "--bos",
            help="Begin every window and prompt with the BOS token. auto: windows begin with it if the model was "
            "trained that way (Gemma), prompts if the tokenizer adds it.  [default: the recipe's, otherwise auto]",
        ),
    ] = None,
    max_windows: MaxWindows = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Measure accuracy on tasks of the lm-evaluation-harness: comma-separated names, such as "
            "hellaswag,piqa, or task files (*.yaml).",
        ),
    ] = None,
    max_items: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Evaluate only the first N items of each task.")
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="Measure tokens per second and memory of an exported model, and of its base model."
        ),
    ] = False,
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Measure this model too, for comparison. Repeatable.",
            autocompletion=model_names,
        ),
    ] = None,
    base: BaseModel = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Load the weights as float32, float16 or bfloat16.  [default: as stored; for a run, the recipe's]",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="cpu, cuda, cuda:1 …  [default: a GPU if there is one; for a run, the recipe's]"
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, accuracy on tasks and speed of a model.

    For a run directory, the pruned model is measured without an export, and the results go into the model card.
    """
    from pgprune_cli.jobs.evaluation_request import EvaluationRequest, task_names

    request = EvaluationRequest(
        model=model,
        corpora=ppl or [],
        seqlens=seqlen or [],
        max_windows=max_windows,
        tasks=[] if tasks is None else task_names(tasks),
        max_items=max_items,
        speed=speed,
        baselines=baselines or [],
        base=base,
        dtype=dtype,
        device=device,
        bos={None: None, "auto": "auto", "true": True, "false": False}[bos],
    )
    request.check()  # before seconds of imports
    from pgprune_cli.jobs.evaluate import evaluate, with_baselines

    results = evaluate(request, progress=progress_of(quiet))
    if as_json:
        print(json.dumps(with_baselines(results)))
    else:
        print_measured(results)
