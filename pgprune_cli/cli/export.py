"""pgprune export: write the smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pgprune_cli.cli.options import AsJson, BaseModel, Quiet, examples, progress_of, search_names
from pgprune_cli.cli.saved import NOTHING_NEW, saved_by_export
from pgprune_cli.cli.stopping import resumable
from pgprune_cli.cli.tables import export_line, print_plan, print_result
from pgprune_cli.run.layout import refuse_unfinished
from pgprune_cli.storage.paths import expanded

EXAMPLES = examples(
    "export runs/smollm2-135m-30 --dry-run",
    "export runs/smollm2-135m-30 --dtype bfloat16 --pad-ffn 64",
    "export runs/smollm2-135m-30 --format gguf --dtype q8_0",
    "export models/smollm2-135m-30 --format gguf",
)

Format = Literal["hf", "gguf", "mlx"]


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="The run directory of a finished search, or an exported model.",
            autocompletion=search_names,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="A new or empty directory, or a new .gguf file.  [default: models/<run>]",
        ),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf for transformers and vLLM, gguf for llama.cpp, mlx for mlx-lm (transformers reads it too).",
        ),
    ] = "hf",
    model: BaseModel = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="float32, float16, bfloat16; for gguf also q8_0, q6_k, q4_k_m and more.  [default: the base model's]",
        ),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Maximum size of one weight file. Not for gguf.  [default: 5GB]"),
    ] = None,
    pad_empty_attention: Annotated[
        bool,
        typer.Option(
            "--pad-empty-attention",
            help="Give layers without attention one zero-weight KV head. vLLM's Transformers backend needs it.",
        ),
    ] = False,
    pad_kv_heads: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Pad the KV heads of each layer with zeros to a multiple of N, or to all of them."
        ),
    ] = 1,
    pad_ffn: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Pad the FFN channels of each layer with zeros to a multiple of N, or to all."
        ),
    ] = 1,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload the model to the Hugging Face Hub.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing. Print the shapes and sizes of the tensors.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the smaller model as a directory or one GGUF file.

    The tokenizer, a model card and the decision are included. Padding does not change the model's outputs.
    """
    from pgprune_cli.export import hub

    if push is not None:
        hub.check_name(push)
    run = expanded(run)
    if not (run / "config.json").exists():
        refuse_unfinished(run)  # before seconds of imports
    with resumable(lambda _: NOTHING_NEW):
        from pgprune_cli.jobs import export as job

        options = job.options_of(
            format,
            dtype=dtype,
            shard_size=shard_size,
            pad_empty_attention=pad_empty_attention,
            pad_kv_heads=pad_kv_heads,
            pad_ffn=pad_ffn,
        )
        out = job.target(run, out, format)
    if dry_run:
        planned = job.plan(run, options, format, model)
        print_plan(job.summary(planned, out), job.tensors(planned, out), as_json)
        return
    with resumable(lambda _: saved_by_export(out, push)):
        written = job.export(run, out, options, format=format, base=model, progress=progress_of(quiet))
        summary = job.summary(written, out, written=True)
        line = export_line(summary)
        if push is not None:
            with progress_of(quiet).working(f"uploading {out} to {push}"):
                summary["pushed"] = hub.push(out, push)
            line += f"; {summary['pushed']}"
    print_result(summary, as_json, line)
