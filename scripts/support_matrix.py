"""Write which model types pgprune prunes, and which runtime loads the result, between the markers of docs/serving.md.

    python scripts/support_matrix.py [--check]

The cells come from the code that does it: the family adapters, the modelling file, the vLLM plugin, and the writers of
GGUF and MLX. With --check, write nothing and fail if the table is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from pgprune_cli.core.families import BLOCKS_OF
from pgprune_cli.export import mlx
from pgprune_cli.export.gguf_architectures import ARCHITECTURES
from pgprune_cli.model.families import FAMILIES
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.serving import modeling_pruned, vllm_plugin

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
NO = "–"

MARK = " \\*"
FOOTNOTES = {
    "olmo3": "The released OLMo 3 models scale their RoPE with YaRN, which llama.cpp's `olmo2` cannot store. Export "
    "them with\n`--format hf`.",
}
"""By model type, what a runtime does not load of it."""

HEAD = ("model type", "units that are removed", "transformers", "vLLM plugin", "llama.cpp", "MLX")


def units(family: ModelFamily, model_type: str) -> str:
    """Return what is removed from a model of this type, in words."""
    parts = [part for block in family.kinds for part in _units_of(family, model_type, block)]
    return ", ".join(parts)


def _units_of(family: ModelFamily, model_type: str, block: Block) -> list[str]:
    if family.refusal(model_type, block.name):
        return [name for name, blocks in BLOCKS_OF.items() if blocks == (block.name,) and name != block.name]
    return [name for name in (block.group_name, block.element_name) if name]


def row(family: ModelFamily, model_type: str) -> tuple[str, ...]:
    """Return the cells of a model type. Two values with a slash are for unequal and for equal layers."""
    names = family.gguf.get(model_type)
    unequal, equal = (
        name if name in ARCHITECTURES else None for name in ((names.unequal, names.equal) if names else (None, None))
    )
    return (
        f"`{model_type}`",
        units(family, model_type),
        f"{'yes' if model_type in modeling_pruned.FAMILIES else NO} / stock",
        "yes" if model_type in vllm_plugin.FAMILIES else NO,
        f"{_code(unequal)} / {_code(equal or unequal)}" + (MARK if model_type in FOOTNOTES else ""),
        "yes" if model_type in mlx.FAMILIES else NO,
    )


def _code(name: str | None) -> str:
    return NO if name is None else f"`{name}`"


def table() -> str:
    """Return the table as Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(family, kind) for family in FAMILIES for kind in family.model_types)]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*lines, *(f"\n{MARK.strip()} {note}" for note in FOOTNOTES.values())])


def page() -> str:
    """Return docs/serving.md with the current table between its markers."""
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN in text and END in text, f"{PAGE.name} has no markers of the support matrix"
    block = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    from reference import write_or_check  # beside this script, which the tests import as a module

    write_or_check({PAGE: page()}, "the code")
