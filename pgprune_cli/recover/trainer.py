"""transformers' Trainer with the loss, the history and the checkpoints of a recovery."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError, in_short
from pgprune_cli.forward.masked import residual_streams
from pgprune_cli.model.devices import memory_in_use
from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.recover.checkpoints import TRAINED, TrainingCheckpoint, finish, is_finished
from pgprune_cli.recover.heldout import mean_on_heldout
from pgprune_cli.recover.loss import divergences, hidden_errors, text_losses
from pgprune_cli.recover.schedule import Schedule, WindowOrder
from pgprune_cli.recover.student import trained_parameters
from pgprune_cli.recover.teacher import Targets, Teacher
from pgprune_cli.recover.texts import RecoveryText
from pgprune_cli.run.layout import training_checkpoint_folder
from pgprune_cli.run.training_history import TrainingHistory, TrainingRow
from pgprune_cli.storage.safetensors_file import write_tensors

ROWS = 1000
"""About how many rows the history of a long training has. A shorter one has a row for every step."""

Reporter = Callable[[TrainingRow], None]
"""Gets every row of the history on the process that writes it."""


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and where its state is kept.

    run: the run directory; settings: of the recipe; seed: of the order of the windows; schedule: how long; text: the
    windows; teacher: predicts them; layers: the student's decoder layers, whose residual streams are compared with
    those in the teacher's targets, empty if none are; resumed: the checkpoint that it goes on from, whose weights the
    student has; report: gets the history's rows; ranks: this process among those of the recovery; bfloat16: compute
    matrix products in bfloat16. Trained weights, gradients and optimizer states are float32 anyway.
    """

    run: Path
    settings: RecoverSettings
    seed: int
    schedule: Schedule
    text: RecoveryText
    teacher: Teacher
    layers: Sequence[nn.Module] = ()
    resumed: TrainingCheckpoint | None = None
    report: Reporter = lambda row: None
    ranks: Ranks = field(default_factory=Ranks)
    bfloat16: bool = False


class RecoveryTrainer(Trainer):
    """A Trainer that minimises the distance from a teacher, and keeps a history and checkpoints as pgprune does.

    history: None on the processes that do not write; signals: holds the signal that asks to stop, once there is one.
    """

    def __init__(
        self,
        student: nn.Module,
        arguments: TrainingArguments,
        training: Training,
        history: TrainingHistory | None,
        signals: list[int],
    ) -> None:
        self.training, self.history = training, history
        self.trained = list(trained_parameters(student))
        # Cached predictions, and which positions are trained on, are known for the windows of the text only.
        shifted = training.settings.teacher == "live" and training.text.trained is None
        windows = training.schedule.steps * training.schedule.windows_per_step
        order = WindowOrder(training.text, windows, training.seed, shifted=shifted)
        super().__init__(
            student,
            arguments,
            train_dataset=order,
            data_collator=default_collate,
            callbacks=[_StepCallback(self, signals)],
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the positions of all accumulated batches
        self.loss_is_scaled_for_ga = True
        self.heldout: tuple[int, float] | None = None
        self.divergence = torch.zeros((), dtype=torch.float64)
        self.seconds = 0.0 if training.resumed is None else training.resumed.seconds
        self.clock = _Clock()

    # --- the loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the batches of one step, and how many positions they train on over all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        count = sum(int(batch["positions"].sum()) for batch in batches)
        return batches, int(self.training.ranks.sum(float(count)))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """Return this batch's part of the loss of its step. The parts of all batches and processes add up to it."""
        loss, divergence = self._losses(model, inputs)
        share = self.args.world_size / max(num_items_in_batch or 0, 1)  # gradients are averaged over processes
        self.divergence += divergence.detach().double().cpu() * share
        return loss * share

    def _losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the divergence, both summed over the positions that count, in nats."""
        settings, windows, positions = self.training.settings, inputs["input_ids"], inputs["positions"]
        targets: Targets = self.training.teacher.targets(windows, inputs["rows"])
        products = torch.autocast(windows.device.type, torch.bfloat16, enabled=self.training.bfloat16)
        with products, residual_streams(self.training.layers) as streams:
            logits = model(input_ids=windows, use_cache=False).logits
        divergence = (divergences(logits, targets, settings.temperature) * positions).sum()
        loss = divergence
        if settings.hidden:
            loss = loss + settings.hidden * (hidden_errors(streams, targets.hidden or ()) * positions).sum()
        if settings.lm:
            loss = loss + settings.lm * (text_losses(logits, windows) * positions).sum()
        return loss, divergence

    @torch.no_grad()
    def heldout_divergence(self) -> float:
        """Return the mean divergence on the held-out windows, in nats per token: the same on all processes."""
        training, model = self.training, self.model_wrapped

        def divergence_of(batch: dict[str, Tensor]) -> Tensor:
            return self._losses(model, self._prepare_inputs(batch))[1]

        model.eval()
        mean = mean_on_heldout(training.text, training.settings.batch, divergence_of, training.ranks)
        model.train()
        return mean

    # --- the history

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the row of the step just done, after evaluating the held-out text if that is due.

        Raises RunError if the loss or the gradient is not finite.
        """
        if "loss" not in logs:  # the summary at the end
            return
        step = self.state.global_step
        norm = logs.get("grad_norm", 0.0)
        self._refuse_not_finite("the loss or its gradient", logs["loss"], norm)
        divergence = self.training.ranks.sum(float(self.divergence)) / self.args.world_size
        steps = self.clock.steps(step)
        self.divergence.zero_()
        spent = self.clock.since_last_row()
        self.row(
            loss=logs["loss"],
            divergence=divergence / max(1, steps),
            learning_rate=logs["learning_rate"],
            tokens_per_second=steps * self._tokens_per_step / spent,
        )

    def row(
        self,
        loss: float | None = None,
        divergence: float | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Write a row of the history, after evaluating the held-out text if that is due.

        Raises RunError if the divergence on it is not finite.
        """
        step = self.state.global_step
        due = self.training.schedule.is_due(step)
        if due:
            self.heldout = (step, self.heldout_divergence())
            self._refuse_not_finite("the divergence on held-out text", self.heldout[1])
        row = TrainingRow(
            step=step,
            tokens=step * self._tokens_per_step,
            loss=loss,
            divergence=divergence,
            heldout_divergence=self.heldout[1] if due and self.heldout else None,
            learning_rate=learning_rate,
            tokens_per_second=tokens_per_second,
            memory_bytes=memory_in_use(),
            seconds=self.elapsed(),
        )
        if self.history is not None:
            self.history.append(row)
            self.training.report(row)
        self.clock.row_written(step)

    def _refuse_not_finite(self, what: str, *values: float) -> None:
        if all(map(math.isfinite, values)):
            return
        raise RunError(
            f"step {self.state.global_step}: {what} is not finite. Lower recover.learning_rate, and start over in "
            f"another directory, or remove {self.training.run}."
        )

    def elapsed(self) -> float:
        """Return the seconds of training so far, over all starts."""
        return self.seconds + time.monotonic() - self.clock.started

    @property
    def _tokens_per_step(self) -> int:
        return self.training.schedule.windows_per_step * self.training.text.windows.shape[1]

    # --- the data and the checkpoints

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        """Return a sampler in order, because `WindowOrder` is shuffled."""
        return SequentialSampler(self.train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights of a checkpoint, in float32 and under their names in the model."""
        weights = (
            self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else trained_parameters(self.model)
        )
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_tensors(Path(output_dir) / TRAINED, {name: weights[name].detach() for name in self.trained})

    def _load_from_checkpoint(self, *_: Any) -> None:
        """Do nothing: the student comes with the weights of the checkpoint (`load_trained`)."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and, when all processes are done, its record. One that is there already is kept."""
        training, step = self.training, self.state.global_step
        folder = training_checkpoint_folder(training.run, step)
        if training.ranks.max(int(training.ranks.is_writer and is_finished(folder))):  # stopped before the next step
            return
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch.save does not raise OSError
            raise RunError(
                f"{folder}: cannot be written: {in_short(error, 160)}. Make room, then run the same command again."
            ) from error
        training.ranks.barrier()
        if self.history is not None:
            heldout = self.heldout[1] if self.heldout and self.heldout[0] == step else None
            finish(TrainingCheckpoint(folder, heldout, self.elapsed(), self.history.flush()))
        training.ranks.barrier()


class _StepCallback(TrainerCallback):
    """Says after every step whether to log, to save and to stop, and writes the row of the start."""

    def __init__(self, trainer: RecoveryTrainer, signals: list[int]) -> None:
        self.trainer, self.signals = trainer, signals

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.clock = _Clock(state.global_step)
        if state.global_step == 0:
            self.trainer.row()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule = self.trainer.training.schedule
        stop_signal = self.trainer.training.ranks.max(self.signals[0] if self.signals else 0)
        control.should_save = bool(stop_signal) or schedule.is_due(state.global_step)
        control.should_log = control.should_save or state.global_step % max(1, schedule.steps // ROWS) == 0
        control.should_training_stop = bool(stop_signal) or state.global_step >= schedule.steps


class _Clock:
    """Measures the time between rows, without evaluations. step: the last one that has a row."""

    def __init__(self, step: int = 0) -> None:
        self.started = self.last = time.monotonic()
        self.step = step

    def steps(self, now: int) -> int:
        """Return the steps since the row before."""
        return now - self.step

    def since_last_row(self) -> float:
        """Return the seconds since the row before was written."""
        return max(time.monotonic() - self.last, 1e-9)

    def row_written(self, step: int) -> None:
        """Start measuring anew."""
        self.last, self.step = time.monotonic(), step
