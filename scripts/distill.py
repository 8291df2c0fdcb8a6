"""Recovers a pruned model by distillation: trains it to predict what its dense model predicts.

    python scripts/distill.py MODEL --teacher DENSE --text FILE --out DIR [--steps 400] [--lora 16]

MODEL is a directory that `pgprune export` wrote, DENSE anything that a recipe's `model:` may be, FILE a corpus as
`calibration.corpus` names it. DIR loads as MODEL does, with the same modelling file. This is training: unlike all
that pgprune itself does it needs gradients, and memory for them (16 bytes a parameter and more; with --lora far less).

The loss is the Kullback-Leibler divergence of the student's next-token distributions from the teacher's, in nats per
token, after Hinton et al. 2015 (arXiv:1503.02531); `--lm` adds so many times the loss on the text's own tokens. A plain
subclass of transformers' Trainer: copy it and change what you need. Needs the extra: pip install -e '.[recovery]'.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import cut_windows
from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_model, load_tokenizer
from pgprune_cli.model.source import resolve


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of logits `(B, T, V)`, the mean over tokens: a float32 scalar, nats."""
    ours, theirs = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) / student.shape[:-1].numel()


class Distillation(Trainer):
    """A Trainer whose loss is the divergence from a frozen teacher, plus `lm` times the loss on the tokens."""

    def __init__(self, *arguments: Any, teacher: nn.Module, lm: float = 0.0, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.teacher = teacher.to(self.args.device)
        self.lm = lm
        self.model_accepts_loss_kwargs = False  # the loss below is a mean; Trainer is to average over accumulated steps

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        tokens = inputs["input_ids"]
        outputs = model(input_ids=tokens, use_cache=False)
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits
        loss = divergence(outputs.logits, wanted)
        if self.lm:
            predictions = outputs.logits[:, :-1].float().flatten(0, 1)
            loss = loss + self.lm * functional.cross_entropy(predictions, tokens[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def distill(settings: argparse.Namespace) -> None:
    """Trains and writes `settings.out`, which must not exist; nothing is left of a run that fails."""
    out: Path = settings.out
    if out.exists():
        raise UserError(f"{out}: exists already")
    source, dense = resolve(settings.model), resolve(settings.teacher)
    tokenizer = load_tokenizer(source)
    student, teacher = load_model(source, "auto", "cpu"), load_model(dense, "bfloat16", "cpu")
    stored, student = student.dtype, student.float()
    if student.config.vocab_size != teacher.config.vocab_size:
        sizes = f"{student.config.vocab_size:,} and {teacher.config.vocab_size:,} tokens"
        raise UserError(f"{settings.teacher}: is not the dense model of {settings.model}: vocabularies of {sizes}")
    text = cut_windows(tokens_of(settings.text, "calibration", tokenizer), settings.seqlen)
    if len(text) < settings.batch:
        raise UserError(f"{settings.text}: {len(text)} windows of {settings.seqlen} tokens make no batch")
    if settings.lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=settings.lora, lora_alpha=settings.lora, target_modules="all-linear")
        student = get_peft_model(student, adapters)
    else:
        student.requires_grad_(True)
    part = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        arguments = TrainingArguments(
            output_dir=str(part),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            gradient_accumulation_steps=settings.accumulate,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine",
            warmup_steps=settings.steps // 20,
            max_grad_norm=1.0,
            bf16=True,  # products only: weights, their gradients and the optimizer's state are float32
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            logging_steps=max(1, settings.steps // 20),
            save_strategy="no",
            report_to="none",
        )
        rows = [{"input_ids": window} for window in text]
        Distillation(student, arguments, train_dataset=rows, teacher=teacher, lm=settings.lm).train()
        if settings.lora:
            student = student.merge_and_unload()
        student.to(stored).save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card(settings))
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def card(settings: argparse.Namespace) -> str:
    """The model card: what the model was, and what was done to it."""
    tokens = settings.steps * settings.batch * settings.accumulate * settings.seqlen
    how = f", by adapters of rank {settings.lora} merged into its weights" if settings.lora else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- pgprune\n- pruned\n---\n\n"
        f"# {settings.out.name}\n\n`{Path(settings.model).name}`, a model pruned by pgprune, trained on {tokens:,} "
        f"tokens to predict what its dense model, `{Path(settings.teacher).name}`, predicts{how}: "
        f"{settings.steps} steps, learning rate {settings.lr:g}, {settings.lm:g} times the loss on the text itself.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--teacher", required=True, metavar="DENSE", help="the model it was pruned from")
    parser.add_argument("--text", required=True, metavar="FILE", help="what to train on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the model directory to write")
    parser.add_argument("--steps", type=int, default=400, help="of the optimizer  [400]")
    parser.add_argument("--batch", type=int, default=8, help="windows at a time  [8]")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step  [1]")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window  [128]")
    parser.add_argument("--lr", type=float, default=3e-4, help="the highest learning rate  [3e-4]")
    parser.add_argument("--lm", type=float, default=0.0, help="weight of the loss on the text's own tokens  [0]")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters only, and merge them")
    parser.add_argument("--seed", type=int, default=0)
    try:
        distill(parser.parse_args())
    except UserError as error:
        sys.exit(f"distill: {error}")


if __name__ == "__main__":
    main()
