"""Export for MLX: the directory that hf.py writes, and one more file, which mlx-lm runs with `trust_remote_code`.

transformers and vLLM load the same directory. mlx-lm would read a stock model by itself, but not always rightly: it
passes over the `rope_parameters` of Llamas, the window of Mistrals and the head size of Qwen2s. So the file goes along
with every model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pgprune_cli.export import hf
from pgprune_cli.export.plan import Measured, Options
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision

MODEL_FILE = Path(__file__).parents[1] / "serving" / "modeling_mlx.py"


def plan(source: Source, decision: Decision, options: Options, measured: Measured | None = None) -> hf.DirectoryPlan:
    """The plan of a model directory for MLX. Raises UserError as `hf.plan` does."""
    planned = hf.plan(source, decision, options, measured)
    config = {**planned.config, "model_file": MODEL_FILE.name}
    return dataclasses.replace(planned, config=config, code=(*planned.code, MODEL_FILE))
