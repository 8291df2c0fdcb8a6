"""The model card of an export: what was removed, by which recipe, what it cost, and how to load the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgprune_cli.run.decision import Decision


@dataclass(frozen=True)
class ModelCard:
    """What the card says beyond the decision.

    title: the directory's name; layers: for every layer of the base its kept and all KV heads, kept and all FFN
    channels; padded: where blocks are wider than that, the sparsity with their padding counted as kept; code: whether
    loading runs the modelling file; mlx: whether mlx-lm can load it; measured: the object of `pgprune eval`.
    """

    title: str
    layers: Sequence[tuple[int, int, int, int]]
    parameters_before: int
    parameters_after: int
    padded: float | None
    code: bool
    mlx: bool
    measured: Mapping[str, Any] | None

    def text(self, decision: Decision) -> str:
        """The card as Markdown with YAML front matter."""
        measured = [self._perplexity(), self._tasks()]
        parts = [self._head(decision), self._loading(), *measured, self._layers(), self._recipe(decision)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _head(self, decision: Decision) -> str:
        local = decision.model == "demo" or Path(decision.model).expanduser().exists()
        # A path would mean nothing to whoever reads the card, and a base_model must be a name on the hub.
        base = [] if local else [f"base_model: {json.dumps(decision.model)}"]
        name = (
            f"`{Path(decision.model).name}`"
            if local
            else f"[{decision.model}](https://huggingface.co/{decision.model})"
        )
        front = ["---", "library_name: transformers", *base, "pipeline_tag: text-generation", "tags:"]
        front += ["- pgprune", "- pruned", "---", "", f"# {self.title}", "", ""]
        padding = (
            ""
            if self.padded is None
            else f"Some blocks are padded to sizes that suit runtimes, with units whose output weights are zero; with "
            f"these counted as kept, {self.padded:.1%} of what could be pruned is gone. "
        )
        less = 1 - self.parameters_after / self.parameters_before
        return "\n".join(front) + (
            f"{name}, with attention heads and FFN channels removed by pgprune: {self.parameters_after:,} of "
            f"{self.parameters_before:,} parameters are left ({less:.1%} fewer; {decision.sparsity:.1%} of those that "
            f"could be pruned are gone). {padding}The kept weights were not retrained. "
            f"`decision.safetensors` and `decision.json` say which units stayed, and in which model."
        )

    def _loading(self) -> str:
        lines = ["## Loading", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        trust = ", trust_remote_code=True" if self.code else ""
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{self.title}"{trust})']
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{self.title}")', "```"]
        if self.code:
            lines += [
                "",
                "The layers differ in size, which no stock class can express; `modeling_pruned.py` in this directory "
                "does. Where pgprune is installed, `import pgprune_cli.serving.modeling_pruned` will do instead of "
                "`trust_remote_code`.",
            ]
        if self.mlx:
            trust = '{"trust_remote_code": True}'
            lines += ["", "In mlx-lm, which runs `modeling_mlx.py` of this directory:", "", "```python"]
            lines += ["from mlx_lm import load", ""]
            lines += [f'load("{self.title}", tokenizer_config={trust}, trust_remote_code=True)', "```"]
        return "\n".join(lines)

    def _perplexity(self) -> str:
        rows = (self.measured or {}).get("perplexity", [])
        if not rows:
            return ""
        lines = ["## Perplexity", "", "| corpus | window | perplexity | tokens |", "|---|---|---|---|"]
        lines += [f"| {row['corpus']} | {row['seqlen']} | {row['ppl']:.2f} | {row['tokens']:,} |" for row in rows]
        return "\n".join(lines)

    def _tasks(self) -> str:
        rows = (self.measured or {}).get("tasks", [])
        if not rows:
            return ""
        lines = ["## Tasks", "", "| task | shots | metric | value | standard error | items |"]
        lines.append("|---|---|---|---|---|---|")
        for row in rows:
            error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
            shots = "" if row["shots"] is None else row["shots"]
            cells = [row["task"], shots, row["metric"], f"{row['value']:.4f}", error, f"{row['items']:,}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)

    def _layers(self) -> str:
        lines = ["## What is kept", "", "| base layer | KV heads | FFN channels |", "|---|---|---|"]
        for index, (groups, all_groups, channels, all_channels) in enumerate(self.layers):
            gone = " (layer removed)" if groups == channels == 0 else ""
            lines.append(f"| {index}{gone} | {groups} of {all_groups} | {channels} of {all_channels} |")
        return "\n".join(lines)

    def _recipe(self, decision: Decision) -> str:
        spent = f"{decision.steps} steps, {decision.forward_passes} forward passes"
        loss = decision.heldout_loss
        held = "" if loss is None else f"; held-out calibration loss {loss:.4f} nats per token"
        held += "" if decision.dense_loss is None else f", of the dense model {decision.dense_loss:.4f}"
        return f"## Recipe\n\n{spent}{held}.\n\n```yaml\n{decision.recipe.strip()}\n```"
