"""Multiple-choice items, the task file that describes them, and the accuracies on them by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["king", "queen", "garden", "letter", "river", "old", "small", "dark", "glad", "the", "a", "was", "and", "saw"]


def items_of(count: int) -> list[dict[str, Any]]:
    """Multiple-choice items as HellaSwag has them; the endings differ in length, so that acc and acc_norm do."""
    generator = torch.Generator().manual_seed(0)

    def words(most: int) -> str:
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    return [{"ctx": words(8), "endings": [words(6) for _ in range(4)], "label": index % 4} for index in range(count)]


def task_file(folder: Path, data: Path, name: str = "tales") -> Path:
    """The task of a file of such items, as docs/evaluation.md shows one."""
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
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML too
    return folder / f"{name}.yaml"


@torch.inference_mode()
def by_hand(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracies of choosing the likeliest ending, by its log-likelihood and by that for each of its characters."""
    right = {"acc": 0, "acc_norm": 0}
    for item in items:
        scores = []
        for ending in item["endings"]:
            before, whole = tokenizer.encode(item["ctx"]), tokenizer.encode(f"{item['ctx']} {ending}")
            log_probs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        normed = [score / len(ending) for score, ending in zip(scores, item["endings"], strict=True)]
        right["acc"] += scores.index(max(scores)) == item["label"]
        right["acc_norm"] += normed.index(max(normed)) == item["label"]
    return {name: count / len(items) for name, count in right.items()}
