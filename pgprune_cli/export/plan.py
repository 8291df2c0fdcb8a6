"""What every format's export has in common: options, and a plan that says all of it before a byte is written."""

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
from pgprune_cli.export import safetensors_file as weights
from pgprune_cli.export.dense_model import Base, open_dense_model
from pgprune_cli.export.shapes import Needs, RuntimeShapes, runtime_shapes
from pgprune_cli.export.surgery import Cut, Surgery
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision

DTYPES = ("float32", "float16", "bfloat16")

SLACK = 64 * 2**20
"""Bytes of disk asked for on top of the weights: tokenizer, card, decision."""

Measured = Mapping[str, Any]
"""The object of `pgprune eval`."""


@dataclass(frozen=True)
class Options:
    """How it is written. needs: on top of the format's own; dtype: None for the base's; shard_size: bytes of tensors in
    one file, at most, unless a single tensor has more, where a format has several files."""

    needs: Needs = field(default_factory=Needs)
    dtype: str | None = None
    shard_size: int = 5 * 10**9


@dataclass(frozen=True)
class Plan(ABC):
    """All that an export will be. A format adds what else its files hold, and writes them.

    files: the tensors of every file by its name, which is "" where the export is one file; measured: what goes along.
    """

    base: Base
    decision: Decision
    surgery: Surgery
    files: Mapping[str, list[Cut]]
    measured: Measured | None

    @property
    @abstractmethod
    def model_type(self) -> str:
        """What its runtime calls its architecture."""

    @property
    @abstractmethod
    def stock(self) -> bool:
        """Whether that is one for layers that are all alike."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of the files that hold the tensors."""

    @abstractmethod
    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        """Writes it as the new `out`; on any failure nothing of it is left. `on_bytes(n)` follows a tensor's n bytes.

        Raises UserError: `out` exists, a weight does not fit the dtype; RunError: the disk is too full.
        """

    def stored(self, cut: Cut) -> tuple[str, int]:
        """The dtype of a tensor in its file, and its bytes."""
        return str(cut.dtype).removeprefix("torch."), weights.bytes_of(cut)

    @property
    def form(self) -> RuntimeShapes:
        return self.surgery.form

    @property
    def cuts(self) -> list[Cut]:
        return [cut for cuts in self.files.values() for cut in cuts]

    @property
    def parameters_before(self) -> int:
        """Tied ones count once; likewise after."""
        return sum(tensor.numel() for tensor in self.base.tensors.values())

    @property
    def parameters_after(self) -> int:
        return sum(cut.shape.numel() for cut in self.surgery.cuts())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable parameters that is not written; padding counts as kept."""
        return self.form.sparsity(self.base.shape.parameters)

    def tensors(self, cuts: list[Cut], on_bytes: Callable[[int], None]) -> Iterator[Tensor]:
        """The results of these cuts, read and made one at a time. Raises UserError as `Cut.apply` does."""
        for cut, tensor in zip(cuts, self.base.read(cut.source for cut in cuts), strict=True):
            yield cut.apply(tensor)
            on_bytes(self.stored(cut)[1])


def operate(source: Source, decision: Decision, needs: Needs, dtype: torch.dtype | None = None) -> tuple[Base, Surgery]:
    """The base, and what becomes of its tensors; reads no weights.

    Raises UserError: the base is not the one that the decision was made for, or is quantised or incomplete; nothing is
    kept.
    """
    fingerprint = source.fingerprint()
    if fingerprint != decision.fingerprint:
        raise UserError(
            f"{source.name}: not the model that was searched: its config and weights have the fingerprint "
            f"{fingerprint}, the decision was made for {decision.fingerprint}; put its files back, or search again"
        )
    base = open_dense_model(source, decision)
    form = runtime_shapes(decision.model_mask, needs)
    return base, Surgery(base.shape.family, form, decision.outputs, base.tensors, dtype)


def check_new(out: Path, directory: bool) -> None:
    """Raises UserError where an export as `out` would replace something; an empty directory may become the export."""
    if out.exists() and not (directory and out.is_dir() and not any(out.iterdir())):
        what = " and is not an empty directory" if directory else ""
        raise UserError(f"{out}: exists already{what}; choose another name, or remove it")


def check_space(out: Path, needed: int) -> None:
    """Raises RunError where `needed` bytes for `out`, which is absolute, are more than the disk has."""
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    if free < needed:
        raise RunError(f"{out}: needs about {needed / 1e6:,.0f} MB of disk, and {free / 1e6:,.0f} MB are free")
