"""Export to a transformers model directory.

The decision is replayed on the base model's weights, one tensor at a time. A model whose layers all have the same sizes
becomes a stock one; any other takes `modeling_pruned.py` along. Either way its logits are those of the masked dense
model, with the repaired weights if there was a repair.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgprune_cli.export.carried_card import carried_card
from pgprune_cli.export.checksums import MODEL_CARD, write_checksums
from pgprune_cli.export.dense_model import DenseModel
from pgprune_cli.export.hf_config import export_config, reorders_attention
from pgprune_cli.export.model_card import REORDERED, Loading, ModelCard
from pgprune_cli.export.plan import DISK_RESERVE, Again, Measured, Options, Plan, check_new, check_space, prepare
from pgprune_cli.export.surgery import TensorEdit
from pgprune_cli.model.source import INDEX, Source
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, RECOVERY_RECORD
from pgprune_cli.serving import modeling_pruned
from pgprune_cli.storage import safetensors_file
from pgprune_cli.storage.atomic import new_directory, write_bytes
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import write_json, write_record

SHARD_SIZE = 5 * 10**9
"""The most bytes of tensors in one file, unless the user says otherwise."""


@dataclass(frozen=True)
class DirectoryPlan(Plan):
    """The plan of a model directory. config: the content of config.json; code: the modelling files that are copied."""

    config: Mapping[str, Any]
    code: tuple[Path, ...]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def stock(self) -> bool:
        return "auto_map" not in self.config

    @property
    def bytes(self) -> int:
        return sum(
            len(safetensors_file.header(edits)) + sum(map(safetensors_file.bytes_of, edits))
            for edits in self.files.values()
        )

    @property
    def notes(self) -> list[str]:
        return [REORDERED] if self._reordered else []

    @property
    def _reordered(self) -> bool:
        return self.stock and reorders_attention(self.config)

    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        out = expanded(out).resolve()
        check_new(out, directory=True)
        check_space(out, self.bytes + DISK_RESERVE)
        with new_directory(out) as directory:
            write_json(directory / "config.json", self.config)
            self.base.write_auxiliary_files(directory)  # first, because a tokenizer may be refused
            for name, edits in self.files.items():
                safetensors_file.write(directory / name, edits, self.tensors(edits, on_bytes))
            self._write_index(directory)
            for file in self.code:
                shutil.copyfile(file, directory / file.name)
            self._write_provenance(directory)
            write_bytes(directory / MODEL_CARD, self._model_card(out.name).encode())
            write_checksums(directory)

    def _write_index(self, directory: Path) -> None:
        """Write which file each tensor is in, even for one file: else servers take decision.safetensors for weights."""
        file_of = {edit.name: name for name, edits in self.files.items() for edit in edits}
        total = sum(map(safetensors_file.bytes_of, self.edits))
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})

    def _write_provenance(self, directory: Path) -> None:
        """Write the decision and, of a model that was trained, the record of its recovery."""
        if self.again is None:
            # Without the repaired blocks, which the weights hold already: they could double the size.
            dataclasses.replace(self.decision, repaired={}).save(directory)
            return
        for name in (DECISION_MASKS, DECISION_RECORD):
            shutil.copyfile(self.again.directory / name, directory / name)
        if self.again.recovery is not None:
            write_record(directory / RECOVERY_RECORD, self.again.recovery.content(self.again.earlier))
        elif self.again.earlier:
            shutil.copyfile(self.again.directory / RECOVERY_RECORD, directory / RECOVERY_RECORD)

    def _model_card(self, title: str) -> str:
        loading = Loading(
            title=title,
            auto_class="AutoModelForCausalLM" if self.base.wrapper is None else "AutoModelForImageTextToText",
            needs_code=not self.stock,
            loads_in_mlx="model_file" in self.config,
            reordered=self._reordered,
        )
        if self.again is not None:
            path = self.again.directory / MODEL_CARD
            card = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
            return carried_card(card, self.decision, loading, self.again.recoveries, self.again.recovery is not None)
        card_of_decision = ModelCard(
            loading=loading,
            dense=self.base.shape,
            layers=self.shapes.kept,
            parameters_before=self.parameters_before,
            parameters_after=self.parameters_after,
            padded_sparsity=self.sparsity if self.shapes.padded else None,
            measured=self.measured,
        )
        return card_of_decision.text(self.decision)


def plan(
    source: Source, decision: Decision, options: Options, measured: Measured | None = None, again: Again | None = None
) -> DirectoryPlan:
    """Return the plan of a model directory. Reads no weights. Raises UserError as `prepare` does."""
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    base, surgery = prepare(source, decision, options.requirements, dtype, again)
    config = export_config(base, surgery, options.dtype)
    code = (Path(modeling_pruned.__file__),) if "auto_map" in config else ()
    edits = [dataclasses.replace(edit, name=base.stored_name(edit.name, edit.source)) for edit in surgery.edits()]
    files = _split_into_files(edits, options.shard_size or _shard_size(base, again))
    return DirectoryPlan(base, decision, surgery, files, measured, again, config, code)


def _shard_size(base: DenseModel, again: Again | None) -> int:
    """Return the most bytes of tensors in one file if the user does not say: as it was, or else 5 GB."""
    if again is None or len(base.shards) == 1:
        return SHARD_SIZE
    return max(sum(tensor.nbytes for tensor in shard.tensors.values()) for shard in base.shards)


def _split_into_files(edits: list[TensorEdit], shard_size: int) -> dict[str, list[TensorEdit]]:
    """Return the tensors of each file, which has at most `shard_size` bytes of them unless it holds a single tensor.

    Within a file the wider dtypes come first, so that every tensor is aligned.
    """
    shards: list[list[TensorEdit]] = [[]]
    size = 0
    for edit in edits:
        size += safetensors_file.bytes_of(edit)
        if size > shard_size and shards[-1]:
            shards.append([])
            size = safetensors_file.bytes_of(edit)
        shards[-1].append(edit)
    shards = [sorted(shard, key=lambda edit: -edit.dtype.itemsize) for shard in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}
