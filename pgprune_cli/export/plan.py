"""What the exports of all formats share: options, and a plan that is complete before anything is written."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.export.dense_model import DenseModel, open_dense_model, open_directory
from pgprune_cli.export.room import with_room
from pgprune_cli.export.shapes import RuntimeShapes, ShapeRequirements, runtime_shapes
from pgprune_cli.export.surgery import Surgery, TensorEdit
from pgprune_cli.export.trained_weights import with_trained
from pgprune_cli.model.families.adapter import dense_type
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision, refuse_other_base
from pgprune_cli.run.layout import DECISION_RECORD
from pgprune_cli.run.recovery import RecoveryRecord
from pgprune_cli.storage import safetensors_file
from pgprune_cli.storage.atomic import refuse_unencodable

DTYPES = ("float32", "float16", "bfloat16")

DISK_RESERVE = 64 * 2**20
"""Bytes of free disk that an export asks for on top of its weights: tokenizer, model card, decision."""

Measured = Mapping[str, Any]
"""What `pgprune eval` measured: its JSON object."""


@dataclass(frozen=True)
class Options:
    """How to write an export.

    requirements: of the user, on top of the format's own; dtype: None to keep the base model's; shard_size: most bytes
    of tensors in one file, for formats with several files, None for 5 GB or, if an exported model is written again, for
    files as it has. A larger tensor gets a file for itself.
    """

    requirements: ShapeRequirements = field(default_factory=ShapeRequirements)
    dtype: str | None = None
    shard_size: int | None = None


@dataclass(frozen=True)
class Again:
    """An exported model that is written again, with all its units.

    directory: the model; trained: weights in place of its own, by their names in the causal model; recovery: how they
    were trained, None if nothing was; earlier: the recoveries of the model before that, oldest first.
    """

    directory: Path
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    recovery: RecoveryRecord | None = None
    earlier: list[dict[str, Any]] = field(default_factory=list)

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """The record of every recovery, oldest first."""
        return self.earlier if self.recovery is None else [*self.earlier, self.recovery.content([])]


@dataclass(frozen=True)
class Plan(ABC):
    """Everything about an export, before it is written. Each format adds what its files need, and writes them.

    files: the tensors of every file, by file name, which is "" if the export is a single file; measured: results of
    `pgprune eval` for the model card; again: not None if an exported model is written again.
    """

    base: DenseModel
    decision: Decision
    surgery: Surgery
    files: Mapping[str, list[TensorEdit]]
    measured: Measured | None
    again: Again | None

    @property
    @abstractmethod
    def model_type(self) -> str:
        """The name of the architecture in the runtime that loads it."""

    @property
    @abstractmethod
    def stock(self) -> bool:
        """True if that architecture is an ordinary one, whose layers all have the same sizes."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Size of the files that hold the tensors."""

    @property
    def estimated(self) -> bool:
        """True if `bytes` is an estimate."""
        return False

    @property
    def progress_bytes(self) -> int:
        """How many bytes `write` reports."""
        return self.bytes

    @property
    def notes(self) -> list[str]:
        """What users should know about the export beyond its numbers, a sentence each."""
        return []

    @abstractmethod
    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        """Write the export to `out`, which must not exist, and leave nothing there on failure.

        `on_bytes(n)` is called after each tensor of n bytes. Raises UserError if `out` exists or a weight does not fit
        the dtype, RunError if the disk is too full.
        """

    def stored(self, edit: TensorEdit) -> tuple[str, int]:
        """Return the dtype of a tensor in its file, and its size in bytes."""
        return str(edit.dtype).removeprefix("torch."), safetensors_file.bytes_of(edit)

    @property
    def shapes(self) -> RuntimeShapes:
        return self.surgery.shapes

    @property
    def edits(self) -> list[TensorEdit]:
        """Every tensor of the export, file after file."""
        return [edit for edits in self.files.values() for edit in edits]

    @property
    def parameters_before(self) -> int:
        """Number of parameters of the base model. Tied ones count once, here and in `parameters_after`."""
        return sum(tensor.numel() for tensor in self.base.tensors.values()) - self.base.room

    @property
    def parameters_after(self) -> int:
        return sum(edit.shape.numel() for edit in self.surgery.edits())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable parameters that is not written. Padding counts as kept.

        If an exported model is written again, this is the fraction that its decision removed, without padding.
        """
        return self.shapes.sparsity if self.again is None else self.decision.sparsity

    def tensors(self, edits: list[TensorEdit], on_bytes: Callable[[int], None]) -> Iterator[Tensor]:
        """Yield the tensors of these edits, reading and making one at a time.

        Raises UserError as `TensorEdit.apply` does.
        """
        sources = self.base.read(part.source for edit in edits for part in edit.parts)
        for edit in edits:
            made = [part.apply(next(sources)).to(edit.dtype) for part in edit.parts]
            yield made[0] if len(made) == 1 else torch.cat(made)
            on_bytes(self.stored(edit)[1])


def prepare(
    source: Source,
    decision: Decision,
    requirements: ShapeRequirements,
    dtype: torch.dtype | None = None,
    again: Again | None = None,
    *,
    decoder_only: bool = False,
) -> tuple[DenseModel, Surgery]:
    """Return the base model and the surgery that replays the decision on it. Reads no weights.

    again: `source` is the exported model that the decision has made, and all of it is kept; decoder_only: leave out
    what a model of text and images has besides its decoder.

    Raises UserError if the decision was made for another model or keeps nothing, if the model is quantised or
    incomplete, or if trained weights do not fit it.
    """
    if again is None:
        refuse_other_base(source, decision, DECISION_RECORD)
        base, model_mask = open_dense_model(source, decision), decision.model_mask
    else:
        base, model_mask = _whole(with_trained(open_directory(source), again.trained), requirements)
    if decoder_only:
        base = base.decoder_alone()
    shapes = runtime_shapes(base.shape, model_mask, requirements)
    return base, Surgery(base.shape, base.unit_tensors, shapes, decision.repaired, base.tensors, dtype)


def _whole(exported: DenseModel, requirements: ShapeRequirements) -> tuple[DenseModel, ModelMask]:
    """Return an exported model and the mask of all its units, with room for padding if that is required."""
    kind = exported.config.model_type
    if kind != dense_type(kind) and requirements != ShapeRequirements():  # only then may layers lack what is required
        roomy, model_mask = with_room(exported)
        if runtime_shapes(roomy.shape, model_mask, requirements).padded:
            return roomy, model_mask
    return exported, exported.shape.all_kept()


def check_new(out: Path, directory: bool) -> None:
    """Raise UserError if an export to `out` would replace something, or if that path cannot be used.

    An empty directory may become the export. A mount point may not: it cannot be renamed or removed.
    """
    refuse_unencodable(out)
    if out.exists() and not (directory and out.is_dir() and not any(out.iterdir())):
        fault = "already exists and is not an empty directory" if directory else "already exists"
        raise UserError(f"{out}: {fault}. Choose another name or remove it.")
    if out.resolve().is_mount():
        raise UserError(
            f"{out}: a mount point, which cannot be replaced. Give a directory inside it, such as {out / 'model'}."
        )


def check_space(out: Path, required: int) -> None:
    """Raise RunError if the disk has fewer than `required` bytes free for `out`, an absolute path."""
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    if free < required:
        raise RunError(
            f"{out}: needs about {required / 1e6:,.0f} MB of disk, but only {free / 1e6:,.0f} MB are free. "
            "Make room, or write to another disk."
        )
