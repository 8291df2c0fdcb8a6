"""Multiple-choice items, the task file that describes them, and a plain loop that measures accuracies on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["king", "queen", "garden", "letter", "river", "old", "small", "dark", "glad", "the", "a", "was", "and", "saw"]


def items_of(count: int) -> list[dict[str, Any]]:
    """Return items in HellaSwag's format. Their endings differ in length, so that acc and acc_norm differ."""
    generator = torch.Generator().manual_seed(0)

    def words(limit: int) -> str:
        length = int(torch.randint(1, limit + 1, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    return [{"ctx": words(8), "endings": [words(6) for _ in range(4)], "label": index % 4} for index in range(count)]


def task_file(folder: Path, data: Path, name: str = "tales") -> Path:
    """Write a task file for items in the file `data`, like the one in docs/evaluation.md, and return its path."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(folder / "cache")},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{endings}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder / f"{name}.yaml"


@torch.inference_mode()
def by_hand(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> dict[str, float]:
    """Return the accuracies of choosing the likeliest ending.

    acc compares log-likelihoods, acc_norm log-likelihoods per character.
    """
    correct = {"acc": 0, "acc_norm": 0}
    for item in items:
        scores = []
        for ending in item["endings"]:
            context, text = tokenizer.encode(item["ctx"]), tokenizer.encode(f"{item['ctx']} {ending}")
            log_probs = model(torch.tensor([text])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(log_probs[i - 1, text[i]]) for i in range(len(context), len(text))))
        scores_per_character = [score / len(ending) for score, ending in zip(scores, item["endings"], strict=True)]
        correct["acc"] += scores.index(max(scores)) == item["label"]
        correct["acc_norm"] += scores_per_character.index(max(scores_per_character)) == item["label"]
    return {name: count / len(items) for name, count in correct.items()}
