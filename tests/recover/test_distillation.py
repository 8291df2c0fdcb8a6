"""The distillation loss and its Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.models import VOCABULARY, save_tokenizer, tiny_model
from transformers import TrainingArguments

pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")

from pgprune_cli.recover.distillation import (
    DistillationSettings,
    DistillationTrainer,
    distill,
    divergence,
    model_card,
)


def test_divergence_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert divergence(student, teacher).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert divergence(student, student + 3).item() == pytest.approx(0.0, abs=1e-6)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    tokens = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))

    def first_gradient(batch: int, accumulate: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        student, rows = tiny_model("llama-gqa", seed=1).requires_grad_(True), [{"input_ids": row} for row in tokens]
        teacher = tiny_model("llama-gqa")
        trainer = DistillationTrainer(student, arguments, train_dataset=rows, teacher=teacher, lm=0.5)
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert first_gradient(4, 2) == pytest.approx(first_gradient(8, 1), rel=1e-3)


def test_distill_refuses_a_text_shorter_than_a_batch_and_leaves_nothing(tmp_path: Path) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The king was glad. " * 4)
    model, out = str(tmp_path / "model"), tmp_path / "out"
    settings = DistillationSettings(model, model, str(tmp_path / "text.txt"), out, seqlen=64, batch=100)
    with refused("text.txt", "windows of 64 tokens", "a batch of 100"):
        distill(settings)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


def test_model_card_states_the_models_and_the_training() -> None:
    settings = DistillationSettings("runs/small", "org/dense", "text", Path("better"), steps=10, batch=2, lora=4)
    card = model_card(settings)
    for fact in ("`small`", "`dense`", "2,560 tokens", "rank 4", "10 steps", "0.0003"):
        assert fact in card
