"""The model card of an export: what was removed, what that cost, how to load the model, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pgprune_cli import __version__
from pgprune_cli.console.markdown import markdown_table
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.model.names import is_absolute, is_hub_name, short_name
from pgprune_cli.model.prunable import Shape
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.evaluation import accuracy
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD

LOADING = "## How to load it"
PERPLEXITY = "## Perplexity"
TASKS = "## Tasks"
PROVENANCE = "## Where it comes from"
"""The headings of sections that change if the model is written again."""

REORDERED = (
    "Its kinds of attention (`layer_types` in config.json) are not in the usual order of this model type. "
    "A runtime that ignores `layer_types`, such as vLLM with gpt-oss, computes something else."
)


@dataclass(frozen=True)
class Loading:
    """How the export is loaded.

    title: name of the directory; auto_class: the class of transformers that loads the export; needs_code: True if
    loading runs modeling_pruned.py; loads_in_mlx: True if modeling_mlx.py is in the directory; reordered: True if the
    layers' kinds of attention are not in the order that runtimes may expect.
    """

    title: str
    auto_class: str
    needs_code: bool
    loads_in_mlx: bool
    reordered: bool = False

    def text(self) -> str:
        """Return the section of the card."""
        trust = ", trust_remote_code=True" if self.needs_code else ""
        lines = [
            *(LOADING, ""),
            *("```python", f"from transformers import {self.auto_class}, AutoTokenizer", ""),
            f'model = {self.auto_class}.from_pretrained("{self.title}"{trust})',
            *(f'tokenizer = AutoTokenizer.from_pretrained("{self.title}"{trust})', "```"),
        ]
        if self.needs_code:
            lines += [
                "",
                "The layers have different sizes, which the model classes of transformers cannot express. "
                "`trust_remote_code=True` lets transformers run `modeling_pruned.py` from this directory, which can. "
                "If pgprune is installed, `import pgprune_cli.serving.modeling_pruned` does the same without "
                "`trust_remote_code`.",
            ]
        if self.reordered:
            lines += ["", REORDERED]
        if self.loads_in_mlx:
            trust = '{"trust_remote_code": True}'
            lines += [
                *("", "mlx-lm loads the model with `modeling_mlx.py` from this directory:", ""),
                *("```python", "from mlx_lm import load", ""),
                *(f'load("{self.title}", tokenizer_config={trust}, trust_remote_code=True)', "```"),
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelCard:
    """What the card says beyond the decision.

    loading: how the export is loaded; dense: the shape of the base model; layers: the masks of every layer of the base
    model; padded_sparsity: the sparsity if padding counts as kept, None without padding; measured: the results of
    `pgprune eval`.
    """

    loading: Loading
    dense: Shape
    layers: ModelMask
    parameters_before: int
    parameters_after: int
    padded_sparsity: float | None
    measured: Mapping[str, Any] | None

    def text(self, decision: Decision) -> str:
        """Return the card as Markdown with YAML front matter."""
        sections = [
            f"{front_matter(decision)}\n\n# {self.loading.title}\n\n{self._summary(decision)}",
            self.loading.text(),
            self._perplexity(),
            self._tasks(),
            self._kept_units(),
            provenance(decision),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _summary(self, decision: Decision) -> str:
        fewer = 1 - self.parameters_after / self.parameters_before
        units = " and ".join(name for block in self.dense.family.kinds for name in _counted(block))
        sentences = [
            f"This is {_base_name(decision)} after structured pruning with pgprune, which removed some of its {units}.",
            f"It has {self.parameters_after:,} parameters, {fewer:.1%} fewer than the {self.parameters_before:,} of "
            f"the base model. {decision.sparsity:.1%} of the parameters that can be pruned were removed.",
        ]
        if self.padded_sparsity is not None:
            sentences.append(
                "Some blocks are padded to sizes that runtimes need, with units whose output weights are zero. If this "
                f"padding counts as kept, {self.padded_sparsity:.1%} were removed."
            )
        if decision.repaired:
            sentences.append(
                f"{self._refitted(decision.repaired)} were refitted on calibration text. All other kept weights are "
                "those of the base model, and nothing was retrained."
            )
        else:
            sentences.append("The kept weights are those of the base model, and nothing was retrained.")
        return " ".join(sentences)

    def _refitted(self, repaired: RepairedBlocks) -> str:
        """Return which weights were refitted, as the subject of a sentence."""
        inner = dict.fromkeys(name for block in repaired.values() for name in block.inner)
        if not inner:
            return "The output projections of pruned blocks"
        outputs = dict.fromkeys(self.dense.blocks[layer][block].output for layer, block in repaired)
        projections = dict.fromkeys([*(name.removesuffix(".weight").removesuffix(".bias") for name in inner), *outputs])
        return f"The weights of pruned blocks ({', '.join(projections)})"

    def _perplexity(self) -> str:
        rows = (self.measured or {}).get("perplexity", [])
        if not rows:
            return ""
        cells = [
            (row["corpus"], row["seqlen"], f"{row['ppl']:.2f}", f"{row['tokens']:,}", _yes_or_no(row["bos"]))
            for row in rows
        ]
        return f"{PERPLEXITY}\n\n" + markdown_table(("corpus", "window (tokens)", "perplexity", "tokens", "BOS"), cells)

    def _tasks(self) -> str:
        rows = (self.measured or {}).get("tasks", [])
        if not rows:
            return ""
        cells = [
            (
                row["task"],
                "" if row["shots"] is None else row["shots"],
                row["metric"],
                accuracy(row),
                "" if row["stderr"] is None else f"{row['stderr']:.4f}",
                f"{row['items']:,}",
                _yes_or_no(row["bos"]),
            )
            for row in rows
        ]
        headings = ("task", "shots", "metric", "value", "standard error", "items", "BOS")
        return f"{TASKS}\n\n" + markdown_table(headings, cells)

    def _kept_units(self) -> str:
        rows = []
        kinds, grids = self.dense.family.kinds, self.dense.grids
        for index, kept in enumerate(self.dense.kept(self.layers)):
            cells: list[str] = []
            for block in kinds:
                if self.dense.blocks[index].get(block.name, block) != block:  # the layer has the other attention block
                    cells += [""] * len(_counted(block))
                    continue
                (groups, members), grid = kept[block.name], grids[block.name][index]
                if block.group_name:
                    cells.append(f"{groups} of {grid.groups}")
                cells.append(f"{groups * members} of {grid.elements}")
            removed = "" if any(groups for groups, _ in kept.values()) else " (layer removed)"
            rows.append((f"{index}{removed}", *cells))
        names = [name for block in kinds for name in _counted(block)]
        return "## What was kept\n\n" + markdown_table(("layer of the base model", *names), rows)


def _counted(block: Block) -> list[str]:
    """Return what is counted in a block: its groups, if they have a name, and its elements."""
    return [name for name in (block.group_name, block.element_name) if name]


def front_matter(decision: Decision) -> str:
    # The hub accepts only names on the hub as base_model.
    base = [f"base_model: {json.dumps(decision.model)}"] if is_hub_name(decision.model) else []
    lines = ["library_name: transformers", *base, "pipeline_tag: text-generation", "tags:", "- pgprune", "- pruned"]
    return "\n".join(["---", *lines, "---"])


def _base_name(decision: Decision) -> str:
    """Return the base model as Markdown: a link to the hub, or the name of a local directory without its path."""
    if is_hub_name(decision.model):
        return f"[{decision.model}](https://huggingface.co/{decision.model})"
    return f"`{short_name(decision.model)}`"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def provenance(decision: Decision) -> str:
    base = _base_name(decision)
    if decision.steps:
        searched = (
            f"pgprune {__version__} searched for {decision.steps:,} steps with {decision.forward_passes:,} forward "
            f"passes of {base}, and exported the result."
        )
        if decision.best_step is not None and decision.best_step < decision.steps:
            searched += f" The result is the decision of step {decision.best_step}, the best on held-out text."
    else:
        searched = f"pgprune {__version__} kept the units of {base} with the highest scores, without a search."
    lines = [
        *(PROVENANCE, ""),
        f"{searched} The base model's config and weights have the fingerprint `{decision.fingerprint}`. "
        f"`{DECISION_RECORD}` and `{DECISION_MASKS}` record which units were kept.",
    ]
    if decision.heldout_loss is not None:
        dense = "" if decision.dense_loss is None else f"; the base model has {decision.dense_loss:.4f}"
        begins = "Its windows begin with the BOS token." if decision.bos else "Its windows do not begin with BOS."
        loss = f"Loss on held-out calibration text: {decision.heldout_loss:.4f} nats per token{dense}."
        lines += ["", f"{loss} {begins}"]
    lines += _ancestors(decision)
    lines += ["", "The recipe:", "", "```yaml", recipe_text(decision.recipe), "```"]
    return "\n".join(lines)


def recipe_text(recipe: str) -> str:
    """Return a recipe with the names of local models and texts, but not the directories that they are in."""
    recipe = recipe.strip()
    values = [word for value in _texts(yaml.safe_load(recipe)) for word in (value, value.partition("=")[2])]
    for path in sorted(filter(is_absolute, values), key=len, reverse=True):
        recipe = recipe.replace(path, short_name(path))
    return recipe


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _ancestors(decision: Decision) -> list[str]:
    """Return a list of how the base model was made, if it was pruned already: one line per step, oldest first."""
    steps = []
    for earlier in decision.ancestors:
        steps.append(
            f"`{short_name(earlier['model'])}` (fingerprint `{earlier['fingerprint']}`) lost {earlier['sparsity']:.1%} "
            f"of its prunable parameters in a search of {earlier['forward_passes']:,} forward passes."
        )
        if recovery := earlier["recovery"]:
            tokens = sum(each["tokens"] for each in (*recovery.get("earlier", []), recovery))
            steps.append(f"The result was trained on {tokens:,} tokens.")
    if not steps:
        return []
    steps.append(f"The result, {_base_name(decision)}, lost {decision.sparsity:.1%} of the rest in this search.")
    numbered = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return ["", "The base model was pruned before:", "", *numbered]
