"""The training of a recovery: transformers' Trainer with our loss, our history and checkpoints with checksums.

The Trainer does what users know it for: AdamW, the schedule, autocast, accumulation, activation checkpointing, several
processes under torchrun, FSDP through `accelerate launch`. A training that was stopped resumes bit for bit.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.forward.short_attention import ShortAttention
from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.recover.checkpoints import TRAINED, TrainingCheckpoint
from pgprune_cli.recover.schedule import Schedule
from pgprune_cli.recover.student import attends_plainly, trained_parameters
from pgprune_cli.recover.trainer import RecoveryTrainer, Training
from pgprune_cli.run.interruption import Interrupted, stop_signals
from pgprune_cli.run.layout import CHECKPOINTS_FOLDER
from pgprune_cli.run.training_history import TrainingHistory
from pgprune_cli.storage.records import read_tensors

WARMUP = 10
"""The learning rate rises over the first tenth of the steps: all of them divided by this."""


def train(student: nn.Module, arguments: TrainingArguments, training: Training) -> None:
    """Train the student in place, up to the last step. Its checkpoints are in the run directory.

    student: with gradients on for what is trained (`student.trainable`).

    Raises:
        RunError: the loss is not finite, or a checkpoint cannot be written.
        Interrupted: a signal stopped the training; its state is saved.
    """
    folder = None if training.resumed is None else str(training.resumed.folder)
    ranks = training.ranks
    with ExitStack() as stack:
        if attends_plainly(training.settings, on_cpu=arguments.use_cpu):
            stack.enter_context(ShortAttention())
        signals = stack.enter_context(stop_signals(ranks))
        history = stack.enter_context(TrainingHistory(training.run)) if ranks.is_writer else None
        trainer = RecoveryTrainer(student, arguments, training, history, signals)
        trainer.train(resume_from_checkpoint=folder)
        step = trainer.state.global_step
        if stop_signal := ranks.max(signals[0] if signals else 0):
            raise Interrupted(stop_signal, step)


def training_arguments(
    run: Path, settings: RecoverSettings, seed: int, schedule: Schedule, *, on_cpu: bool
) -> TrainingArguments:
    """Return the Trainer's arguments: AdamW and a cosine schedule. Our callback says when to log and to save.

    Autocast is `RecoveryTrainer`'s own: that of the Trainer turns all logits into float32.
    """
    known = {entry.name for entry in fields(TrainingArguments)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    arguments = TrainingArguments(
        output_dir=str(run / CHECKPOINTS_FOLDER),
        max_steps=schedule.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=-(-schedule.steps // WARMUP),
        max_grad_norm=1.0,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and ranks_from_environment().world_size > 1 else None,
        ddp_find_unused_parameters=False,
        seed=seed,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        label_names=["labels"],  # which it cannot find out for a model with adapters, and says so
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=False,
        **{checkpointing: settings.gradient_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for torchrun: no DataParallel
    return arguments


def load_trained(student: nn.Module, checkpoint: TrainingCheckpoint) -> None:
    """Give the student the trained weights of a checkpoint, in place. Raises UserError for a damaged file."""
    weights = read_tensors(checkpoint.folder / TRAINED)
    parameters = trained_parameters(student)
    assert weights.keys() == parameters.keys(), f"{checkpoint.folder}: the weights of another student"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
