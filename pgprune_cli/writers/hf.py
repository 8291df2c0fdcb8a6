"""Export to a transformers model directory: the decision replayed on the base's weights, a tensor at a time.

A model whose layers all have the same sizes is written as a stock one; any other takes `modeling_pruned.py` along.
Either way its logits are those of the masked dense model, with the repaired outputs where there was a repair.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.atomic import sync_directory, write_bytes, write_json
from pgprune_cli.decision import Decision
from pgprune_cli.errors import UserError
from pgprune_cli.loading import INDEX, Source
from pgprune_cli.writers import modeling_pruned, weights
from pgprune_cli.writers.base import Base, open_base
from pgprune_cli.writers.card import Card
from pgprune_cli.writers.hf_config import config_of
from pgprune_cli.writers.normal_form import Needs, NormalForm, normal_form
from pgprune_cli.writers.surgery import Cut, Surgery

SLACK = 64 * 2**20
"""Bytes of disk asked for on top of the weights: tokenizer, card, decision."""


@dataclass(frozen=True)
class Options:
    """How it is written. dtype: None for the base's; shard_size: bytes of tensors in one file, at most, unless a single
    tensor has more."""

    needs: Needs = field(default_factory=Needs)
    dtype: torch.dtype | None = None
    shard_size: int = 5 * 10**9


@dataclass(frozen=True)
class Plan:
    """All that an export will be, known before a byte of it is written. `files`: the tensors of every weight file;
    `code`: the modelling files that travel."""

    base: Base
    decision: Decision
    form: NormalForm
    config: Mapping[str, Any]
    files: Mapping[str, list[Cut]]
    code: tuple[Path, ...]

    @property
    def cuts(self) -> list[Cut]:
        return [cut for cuts in self.files.values() for cut in cuts]

    @property
    def stock(self) -> bool:
        """Whether transformers needs no code for it."""
        return "per_layer_config" not in self.config

    @property
    def bytes(self) -> int:
        """Of the weight files."""
        return sum(len(weights.header(cuts)) + sum(map(weights.bytes_of, cuts)) for cuts in self.files.values())

    @property
    def parameters_before(self) -> int:
        """Tied ones count once; likewise after."""
        return sum(tensor.numel() for tensor in self.base.tensors.values())

    @property
    def parameters_after(self) -> int:
        return sum(cut.shape.numel() for cut in self.cuts)

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable parameters that is not written; padding counts as kept."""
        return self.form.sparsity(self.base.shape.parameters)


def plan(source: Source, decision: Decision, options: Options) -> Plan:
    """What `write` will write; reads no weights.

    Raises UserError: the base is not the one that the decision was made for, or is quantised or incomplete; nothing is
    kept.
    """
    fingerprint = source.fingerprint()
    if fingerprint != decision.fingerprint:
        raise UserError(
            f"{source.name}: not the model that was searched: its config and weights have the fingerprint "
            f"{fingerprint}, the decision was made for {decision.fingerprint}"
        )
    base = open_base(source, decision)
    form = normal_form(decision.keep, options.needs)
    surgery = Surgery(base.shape.spec, form, decision.outputs, base.tensors, options.dtype)
    dtype = None if options.dtype is None else str(options.dtype).removeprefix("torch.")
    config = config_of(base.json, base.config, form, surgery.new_biases, dtype)
    code = (Path(modeling_pruned.__file__),) if "per_layer_config" in config else ()
    return Plan(base, decision, form, config, _files(surgery.cuts(), options.shard_size), code)


def _files(cuts: list[Cut], shard_size: int) -> dict[str, list[Cut]]:
    """The tensors in files of at most `shard_size` bytes, in their order but for the wider dtypes first in a file, so
    that every tensor is aligned."""
    runs: list[list[Cut]] = [[]]
    size = 0
    for cut in cuts:
        size += weights.bytes_of(cut)
        if size > shard_size and runs[-1]:
            runs.append([])
            size = weights.bytes_of(cut)
        runs[-1].append(cut)
    runs = [sorted(run, key=lambda cut: -cut.dtype.itemsize) for run in runs]
    if len(runs) == 1:
        return {"model.safetensors": runs[0]}
    return {f"model-{number:05}-of-{len(runs):05}.safetensors": run for number, run in enumerate(runs, 1)}


def write(plan: Plan, out: Path, measured: Mapping[str, Any] | None, on_bytes: Callable[[int], None]) -> None:
    """Writes the planned model into the new directory `out`; on any failure nothing of it is left.

    `measured` is the object of `pgprune eval`, for the card. `on_bytes(n)` follows every tensor of n bytes.

    Raises:
        UserError: `out` exists and is not an empty directory; the disk is too full; a weight does not fit the dtype.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty directory")
    _check_space(out, plan.bytes + SLACK)
    with _new_directory(out) as directory:
        write_json(directory / "config.json", plan.config)
        for name, cuts in plan.files.items():
            weights.write(directory / name, cuts, _tensors(plan.base, cuts, on_bytes))
        places = {cut.name: name for name, cuts in plan.files.items() for cut in cuts}
        total = sum(map(weights.bytes_of, plan.cuts))
        # For a single file too: without an index, servers take decision.safetensors for weights.
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        plan.base.write_side_files(directory)
        for file in plan.code:
            shutil.copyfile(file, directory / file.name)
        # The repaired outputs are in the weights; a second time they could double the size.
        dataclasses.replace(plan.decision, outputs={}).save(directory)
        write_bytes(directory / "README.md", _card(plan, out.name, measured).text(plan.decision).encode())


def _tensors(base: Base, cuts: list[Cut], on_bytes: Callable[[int], None]) -> Iterator[Tensor]:
    for cut, tensor in zip(cuts, base.read(cut.source for cut in cuts), strict=True):
        yield cut.apply(tensor)
        on_bytes(weights.bytes_of(cut))


def _card(plan: Plan, title: str, measured: Mapping[str, Any] | None) -> Card:
    kept = [(int(k.attention.sum()), len(k.attention), int(k.ffn.sum()), len(k.ffn)) for k in plan.form.kept]
    padded = plan.sparsity if plan.form.padded else None
    return Card(title, kept, plan.parameters_before, plan.parameters_after, padded, not plan.stock, measured)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    if free < needed:
        raise UserError(f"{out}: needs about {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free")


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out`, synced, when the `with` ends well, and vanishes when it does not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync_directory(path)  # which does for files too
        if out.exists():
            out.rmdir()  # empty, as was checked
        temporary.rename(out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
