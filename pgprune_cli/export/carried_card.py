"""The model card of an exported model that is written again: the card that it has, brought up to date.

People may edit the card of an export, so it is carried over and not made anew. Only the title, how to load the model,
what was measured before it was trained, and the recoveries change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pgprune_cli.export.model_card import (
    LOADING,
    PERPLEXITY,
    PROVENANCE,
    TASKS,
    Loading,
    front_matter,
    provenance,
    recipe_text,
)
from pgprune_cli.model.names import is_hub_name, short_name
from pgprune_cli.run.decision import Decision

RECOVERY = "## Recovery"
TRAINED = {
    "all": "All weights were trained",
    "layers": "The weights of the decoder layers were trained",
    "lora": "Adapters of rank {lora_rank} were trained and merged into the weights",
    "norms-and-outputs": "The norms and the output projections were trained",
}
"""What was trained, by `recover.train`."""


@dataclass(frozen=True)
class Section:
    """A heading of the second level with its text, or what precedes the first heading. heading: "" for that."""

    heading: str
    text: str


def carried_card(
    card: str | None,
    decision: Decision,
    loading: Loading,
    recoveries: Sequence[dict[str, Any]],
    newly_trained: bool,
) -> str:
    """Return the card of a model that is written again.

    card: of the model as it was, None if its directory has none; recoveries: their records, oldest first;
    newly_trained: the weights are no longer those of `card`, so what was measured is left out.
    """
    if card is None:
        card = f"{front_matter(decision)}\n\n# {loading.title}\n\n{LOADING}\n\n{provenance(decision)}\n"
    replaced = [LOADING, RECOVERY, *((PERPLEXITY, TASKS) if newly_trained else ())]
    first, *others = [section for section in _sections(card) if section.heading not in replaced]
    opening = _titled(first.text, loading.title)
    if recoveries:
        opening = re.sub(
            r"kept weights are those of the base model, and nothing was retrained\.",
            "kept weights were those of the base model until they were trained (see Recovery).",
            opening,
        )
    texts = [opening, loading.text(), *(section.text for section in others)]
    if recoveries:
        names = [LOADING, *(section.heading for section in others)]
        place = names.index(PROVENANCE) + 1 if PROVENANCE in names else len(texts)
        texts.insert(place, "\n\n".join([RECOVERY, *map(_recovered, recoveries)]))
    return "\n\n".join(text.strip("\n") for text in texts) + "\n"


def _sections(card: str) -> list[Section]:
    """Return what precedes the first heading of the second level, and then every such heading with its text."""
    lines: list[list[str]] = [[]]
    in_code = False
    for line in card.splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("## ") and not in_code:
            lines.append([])
        lines[-1].append(line)
    headings = ["", *(section[0].strip() for section in lines[1:])]
    return [Section(heading, "\n".join(text)) for heading, text in zip(headings, lines, strict=True)]


def _titled(opening: str, title: str) -> str:
    """Return the opening of a card with another title."""
    front, text = re.match(r"(---\n.*?\n---\n)?(.*)", opening, re.DOTALL).groups()  # type: ignore[union-attr]
    return (front or "") + re.sub(r"^# .*$", lambda _: f"# {title}", text, count=1, flags=re.MULTILINE)


def _recovered(record: dict[str, Any]) -> str:
    """Return the paragraph about one recovery."""
    teacher, text = (name if is_hub_name(name) else short_name(name) for name in (record["teacher"], record["text"]))
    sentences = [
        f"The pruned model (fingerprint `{record['fingerprint']}`) was trained to predict what its dense model, "
        f"`{teacher}` (fingerprint `{record['teacher_fingerprint']}`), predicts, on {record['tokens']:,} tokens of "
        f"`{text}`.",
        f"{TRAINED[record['train']].format(**record)}, in {record['steps']:,} steps and {record['seconds']:,.0f} "
        "seconds.",
        f"The divergence from the dense model on held-out text went from {record['loss_before']:.4f} to "
        f"{record['loss_after']:.4f} nats per token.",
    ]
    if record["best_step"] < record["steps"]:
        sentences.append(f"The weights are those of step {record['best_step']:,}, the best on held-out text.")
    settings = yaml.safe_load(recipe_text(record["recipe"])).get("recover")
    if not settings:
        return " ".join(sentences)
    sentences.append("The settings:")
    return f"{' '.join(sentences)}\n\n```yaml\n{yaml.safe_dump({'recover': settings}, sort_keys=False).strip()}\n```"
