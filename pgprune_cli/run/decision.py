"""The decision: which units stay, in which model, under which budget, from which recipe. Small and replayable.

`decision.safetensors` holds a bool tensor `layers.<l>.attention` (over KV heads) and `layers.<l>.ffn` (over channels)
for every layer; `decision.json` says where it comes from, and carries the checksum of the masks. Where the kept weights
were repaired, `repair.safetensors` holds the output projections, `layers.<l>.attention.weight` (hidden, kept inputs)
and so on, and the record its checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pgprune_cli import __version__
from pgprune_cli.errors import UserError
from pgprune_cli.model.masks import LayerMask, ModelMask, Output, Outputs
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, REPAIR_FILE, refuse_unfinished
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import checksum, read_record, read_tensors, refuse_newer, write_record

VERSION = 1


@dataclass(frozen=True)
class Decision:
    """Which units are kept, and where the decision comes from.

    model: as the recipe names it; fingerprint: of the base model's config and weights; sparsity: the removed fraction
    of the prunable parameters; recipe: the resolved recipe as YAML; forward_passes: model evaluations of the search;
    calibration_forward_passes: passes for scores and repair, counted in batches of the search; heldout_loss: of the
    pruned and repaired model on held-out calibration text, in nats per token; dense_loss: the same of the dense model;
    outputs: the repaired output projections; budget: the `measure` that was budgeted and the fraction of it `kept`.
    """

    model_mask: ModelMask
    model: str
    fingerprint: str
    sparsity: float
    recipe: str
    steps: int
    forward_passes: int
    calibration_forward_passes: int
    heldout_loss: float | None
    outputs: Outputs = field(default_factory=dict)
    budget: dict[str, str | float] = field(default_factory=dict)
    dense_loss: float | None = None

    def save(self, run: Path) -> None:
        """Writes both files into `run`, each whole or not at all; the record, which names the masks, last."""
        from safetensors.torch import save

        tensors = {}
        for index, layer in enumerate(self.model_mask):
            tensors[f"layers.{index}.attention"] = layer.attention
            tensors[f"layers.{index}.ffn"] = layer.ffn
        write_bytes(run / DECISION_MASKS, save(tensors))
        record = {name: getattr(self, name) for name in self._recorded()}
        if self.outputs:
            write_bytes(run / REPAIR_FILE, save(_flat(self.outputs)))
        record["repair_sha256"] = checksum(run / REPAIR_FILE) if self.outputs else None
        record["dense_loss"] = self.dense_loss
        record["budget"] = self.budget
        record["kept"] = [{"attention": int(x.attention.sum()), "ffn": int(x.ffn.sum())} for x in self.model_mask]
        record["masks_sha256"] = checksum(run / DECISION_MASKS)
        record["pgprune"] = __version__
        record["version"] = VERSION
        write_record(run / DECISION_RECORD, record)

    @classmethod
    def _recorded(cls) -> list[str]:
        return [
            entry.name for entry in fields(cls) if entry.name not in ("model_mask", "dense_loss", "outputs", "budget")
        ]

    @classmethod
    def load(cls, run: Path, with_repair: bool = True) -> Decision:
        """Reads a decision. Raises UserError when it is missing, damaged or does not belong together.

        The checksum of a repair takes a while on a large model; without it, `outputs` is empty.
        """
        refuse_unfinished(run)
        record = _read_record(run, "remove both and search again")
        tensors = read_tensors(run / DECISION_MASKS)
        try:
            keep = tuple(
                LayerMask(tensors[f"layers.{i}.attention"].to(torch.bool), tensors[f"layers.{i}.ffn"].to(torch.bool))
                for i in range(len(record["kept"]))
            )
            values = {name: record[name] for name in cls._recorded()}
            outputs = _load_outputs(run, record) if with_repair else {}
            return cls(keep, **values, outputs=outputs, dense_loss=record["dense_loss"], budget=record["budget"])
        except KeyError as missing:
            raise _not_whole(run, missing) from None


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from: the base `model` by its name, and the resolved `recipe` as YAML."""

    model: str
    recipe: str


def read_origin(model: Path) -> Origin | None:
    """What the decision beside an exported model says; None where there is none, as beside a dense model.

    The masks may be absent: what is fetched from the hub comes without them. Raises UserError for a damaged decision.
    """
    if not (model / DECISION_RECORD).exists():
        return None
    record = _read_record(model, "export it again")
    try:
        return Origin(record["model"], record["recipe"])
    except KeyError as missing:
        raise _not_whole(model, missing) from None


def _read_record(run: Path, remedy: str) -> dict[str, Any]:
    """The record, held against its own checksum and against the masks where they are there. Raises UserError."""
    record = read_record(run / DECISION_RECORD)
    refuse_newer(run / DECISION_RECORD, record.get("version"), VERSION)
    if (run / DECISION_MASKS).exists() and checksum(run / DECISION_MASKS) != record.get("masks_sha256"):
        raise UserError(f"{run / DECISION_MASKS}: damaged, or not the masks that {DECISION_RECORD} describes; {remedy}")
    return record


def _not_whole(run: Path, missing: KeyError) -> UserError:
    return UserError(f"{run / DECISION_RECORD}: {missing} is missing; the file is not a whole decision")


def _flat(outputs: Outputs) -> dict[str, torch.Tensor]:
    flat = {}
    for (index, name), output in outputs.items():
        for key, value in zip(("weight", "bias"), output, strict=True):
            if value is not None:
                flat[f"layers.{index}.{name}.{key}"] = value.cpu().contiguous()
    return flat


def _load_outputs(run: Path, record: dict[str, Any]) -> Outputs:
    wanted = record["repair_sha256"]
    if wanted is None:
        return {}
    if not (run / REPAIR_FILE).exists() or checksum(run / REPAIR_FILE) != wanted:
        raise UserError(
            f"{run / REPAIR_FILE}: missing, damaged, or not the repair that {DECISION_RECORD} describes; search again"
        )
    return RepairFile(run / REPAIR_FILE)


class RepairFile(Mapping[tuple[int, str], Output]):
    """Repaired outputs in a file, read one by one as they are asked for: all together can be as large as a model."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = set(file.keys())

    def __getitem__(self, key: tuple[int, str]) -> Output:
        from safetensors import safe_open

        weight, bias = (f"layers.{key[0]}.{key[1]}.{part}" for part in ("weight", "bias"))
        if weight not in self._names:
            raise KeyError(key)
        with safe_open(self.path, framework="pt") as file:
            return Output(file.get_tensor(weight), file.get_tensor(bias) if bias in self._names else None)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for name in sorted(self._names):
            _, index, block, part = name.split(".")
            if part == "weight":
                yield int(index), block

    def __len__(self) -> int:
        return sum(1 for _ in self)
