"""Export for MLX: the directory that hf.py writes, and one more file, which mlx-lm runs with `trust_remote_code`.

transformers and vLLM load the same directory. mlx-lm would also read a stock model without this file, but not always
correctly: it ignores the `rope_parameters` of a Llama, the sliding window of a Mistral and the head size of a Qwen2. So
every model gets the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.export import hf
from pgprune_cli.export.plan import Again, Measured, Options
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision

MODEL_FILE = Path(__file__).parents[1] / "serving" / "modeling_mlx.py"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The model types of the dense models that modeling_mlx.py computes."""


def plan(
    source: Source, decision: Decision, options: Options, measured: Measured | None = None, again: Again | None = None
) -> hf.DirectoryPlan:
    """Return the plan of a model directory for MLX.

    Raises UserError as `hf.plan` does, and for models that mlx-lm would not compute as transformers does.
    """
    directory = hf.plan(source, decision, options, measured, again)
    model_type = directory.config["model_type"].removeprefix("pruned_")
    if model_type not in FAMILIES:
        raise UserError(
            f"--format mlx: cannot export a model of type {model_type}, only {', '.join(FAMILIES)}. Use --format hf, "
            f"which works for every family."
        )
    if ignored := next(_ignored(directory.config.get("rope_parameters") or {}), None):
        raise UserError(
            f"--format mlx: the base model's rope_parameters have {ignored}, which mlx-lm does not compute as "
            "transformers does. Use --format hf."
        )
    config = {**directory.config, "model_file": MODEL_FILE.name}
    return dataclasses.replace(directory, config=config, code=(*directory.code, MODEL_FILE))


def _ignored(rope: Mapping[str, Any]) -> Iterator[str]:
    """Yield what mlx-lm silently overlooks in rope_parameters, or computes in another way."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        yield f"the type {kind}"
    if kind != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0:  # transformers overlooks it in the default
        yield f"a partial_rotary_factor of {rope['partial_rotary_factor']}"
    if kind == "yarn":
        if rope.get("attention_factor") is not None:  # overlooked by older versions of mlx-lm
            yield f"an attention_factor of {rope['attention_factor']}"
        if not rope.get("truncate", True):
            yield "truncate: false"
        if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):  # transformers uses either both or none
            yield "only one of mscale and mscale_all_dim"
