"""Recover a pruned model by distillation: train it to predict the next-token distributions of its dense model.

The loss is the Kullback-Leibler divergence of the student from the teacher, in nats per token, after Hinton et al. 2015
(arXiv:1503.02531). Unlike the search, training needs gradients, and the memory for them: about 16 bytes a parameter,
and far less when only LoRA adapters are trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from pgprune_cli.data.bos import bos_token
from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import cut_windows
from pgprune_cli.errors import UserError
from pgprune_cli.model.context import refuse_longer_windows
from pgprune_cli.model.families import begins_with_bos
from pgprune_cli.model.generation import allow_sampling
from pgprune_cli.model.loading import load_model, load_tokenizer
from pgprune_cli.model.older_keys import rope_keys
from pgprune_cli.model.source import resolve
from pgprune_cli.model.tokenizer_files import write_tokenizer
from pgprune_cli.run.layout import DECISION_RECORD, RECOVERY_RECORD
from pgprune_cli.storage.records import read_json, write_json, write_record


@dataclass(frozen=True)
class DistillationSettings:
    """The settings of one recovery run."""

    model: str  # the pruned model: a directory that `pgprune export` wrote
    teacher: str  # the dense model it was pruned from: anything that a recipe's `model:` accepts
    text: str  # the training text: anything that a recipe's `calibration.corpus` accepts
    out: Path  # the directory to write, which must not exist yet
    steps: int = 400  # optimizer steps
    batch: int = 8  # windows per forward pass
    accumulate: int = 1  # batches per optimizer step
    seqlen: int = 128  # tokens per window
    lr: float = 3e-4  # peak learning rate
    lm: float = 0.0  # weight of the language modelling loss on the text's own tokens
    lora: int = 0  # rank of the LoRA adapters; 0 trains all weights
    seed: int = 0


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) of logits `(B, T, V)`, the mean over tokens: a float32 scalar in nats."""
    student_log_probs, teacher_log_probs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    total = functional.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
    return total / student.shape[:-1].numel()


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the divergence from a frozen teacher, plus `lm` times the language modelling loss."""

    def __init__(self, *arguments: Any, teacher: nn.Module, lm: float = 0.0, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.teacher = teacher.to(self.args.device)
        self.lm = lm
        self.model_accepts_loss_kwargs = False  # our loss is a mean, so Trainer must average over accumulated batches

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the loss on `inputs["input_ids"]` `(B, T)`, with the student's outputs if asked for."""
        tokens = inputs["input_ids"]
        outputs = model(input_ids=tokens, use_cache=False)
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=tokens, use_cache=False).logits
        loss = divergence(outputs.logits, teacher_logits)
        if self.lm:
            predictions = outputs.logits[:, :-1].float().flatten(0, 1)
            loss = loss + self.lm * functional.cross_entropy(predictions, tokens[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def distill(settings: DistillationSettings) -> None:
    """Train the pruned model and write it to `settings.out`. A run that fails leaves nothing on disk.

    Windows begin with the BOS token if the model's family was trained so (Gemma), as in a search. The directory loads
    as the pruned model does, with the same modelling file and the same dtype.

    Raises:
        UserError: `out` exists, the model has a vision tower or a shorter context than the windows, the teacher has
            another vocabulary, or the text is shorter than one batch.
    """
    if settings.out.exists():
        raise UserError(f"{settings.out}: already exists. Choose another output directory.")
    source = resolve(settings.model)
    if source.is_wrapped:
        raise UserError(f"{settings.model}: has a vision tower, which would be lost. Recover models of text only.")
    tokenizer = load_tokenizer(source)
    student: Any = load_model(source, "auto", "cpu")
    teacher = load_model(resolve(settings.teacher), "bfloat16", "cpu")
    stored_dtype, student = student.dtype, student.float()
    _require_same_vocabulary(settings, student, teacher)
    refuse_longer_windows(student.config, settings.model, {"--seqlen": settings.seqlen})
    bos = bos_token("auto", tokenizer, begins_with_bos(student.config.model_type), settings.model)
    tokens = tokens_of(settings.text, "calibration", tokenizer, without_bos=bos is not None)
    windows = cut_windows(tokens, settings.seqlen, bos)
    if len(windows) < settings.batch:
        raise UserError(
            f"{settings.text}: {len(windows)} windows of {settings.seqlen} tokens do not fill a batch of "
            f"{settings.batch}. Use a longer text or a smaller batch."
        )
    student = _trainable(student, settings.lora)
    part = settings.out.with_name(f".{settings.out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        rows = [{"input_ids": window} for window in windows]
        arguments = _training_arguments(settings, part)
        DistillationTrainer(student, arguments, train_dataset=rows, teacher=teacher, lm=settings.lm).train()
        if settings.lora:
            student = student.merge_and_unload()
        allow_sampling(student.generation_config)
        student.to(stored_dtype).save_pretrained(part)
        write_json(part / "config.json", read_json(part / "config.json") | rope_keys(student.config))
        write_tokenizer(source, part)
        _write_provenance(settings, source.directory, part)
        part.rename(settings.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _require_same_vocabulary(settings: DistillationSettings, student: Any, teacher: Any) -> None:
    """Raise UserError if the models have vocabularies of different sizes."""
    student_size, teacher_size = student.config.vocab_size, teacher.config.vocab_size
    if student_size != teacher_size:
        raise UserError(
            f"{settings.teacher}: has {teacher_size:,} tokens in its vocabulary, but {settings.model} has "
            f"{student_size:,}. Give the model that {settings.model} was pruned from as the teacher."
        )


def _trainable(student: Any, lora_rank: int) -> Any:
    """Return the student with gradients on: for LoRA adapters of that rank, or for all weights if the rank is 0."""
    if not lora_rank:
        return student.requires_grad_(True)
    from peft import LoraConfig, get_peft_model  # only LoRA needs peft

    return get_peft_model(student, LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules="all-linear"))


def _training_arguments(settings: DistillationSettings, folder: Path) -> TrainingArguments:
    """Return the Trainer's arguments: AdamW, a cosine schedule with 5 % warm-up, no intermediate checkpoints."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        max_grad_norm=1.0,
        bf16=True,  # only matrix products: weights, gradients and optimizer state are float32
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 20),
        save_strategy="no",
        report_to="none",
    )


def _write_provenance(settings: DistillationSettings, pruned: Path, out: Path) -> None:
    """Write the card, the record of the training, and the decision that the pruned model came with, if it has one."""
    (out / "README.md").write_text(model_card(settings))
    tokens = settings.steps * settings.batch * settings.accumulate * settings.seqlen
    write_record(out / RECOVERY_RECORD, {"teacher": settings.teacher, "text": settings.text, "tokens": tokens})
    if (pruned / DECISION_RECORD).exists():
        shutil.copyfile(pruned / DECISION_RECORD, out / DECISION_RECORD)


def model_card(settings: DistillationSettings) -> str:
    """Return the model card: which model this was, and how it was trained."""
    tokens = settings.steps * settings.batch * settings.accumulate * settings.seqlen
    adapters = f", with LoRA adapters of rank {settings.lora} merged into the weights" if settings.lora else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- pgprune\n- pruned\n---\n\n"
        f"# {settings.out.name}\n\n`{Path(settings.model).name}`, a model pruned by pgprune, trained on {tokens:,} "
        f"tokens to predict what its dense model, `{Path(settings.teacher).name}`, predicts{adapters}. It took "
        f"{settings.steps} steps at a peak learning rate of {settings.lr:g}; the language modelling loss had weight "
        f"{settings.lm:g}.\n"
    )
