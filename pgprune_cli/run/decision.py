"""The decision on disk: which units are kept, in which model, under which budget, from which recipe.

`decision.safetensors` holds two bool tensors per layer, `layers.<l>.attention` (query heads) and `layers.<l>.ffn`
(channels). `decision.json` records where the decision comes from and the checksum of the masks. If the kept weights
were repaired, `repair.safetensors` holds the refitted ones: of an output projection `layers.<l>.<block>.weight`
(hidden, kept inputs) and `layers.<l>.<block>.bias`, of any other tensor of a block its kept rows under its name in the
block, `layers.<l>.<block>.<name>`. `decision.json` records the checksum of this file too.

Version 1 had refitted output projections only, under the same names. The fingerprints in versions 1 and 2 missed
changes of single tensors. Such decisions are refused wherever the base model is read, because nothing shows any more
whether it is the model that was searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pgprune_cli import __version__
from pgprune_cli.errors import UserError
from pgprune_cli.model.fingerprint import difference, digest
from pgprune_cli.model.masks import LayerMask, ModelMask, RepairedBlock, RepairedBlocks
from pgprune_cli.model.source import Source
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, RECOVERY_RECORD, REPAIR_FILE, refuse_unfinished
from pgprune_cli.storage.atomic import new_file, write_bytes
from pgprune_cli.storage.records import checksum, read_record, read_tensors, refuse_newer, write_record
from pgprune_cli.storage.safetensors_file import write_tensors

VERSION = 3

LATER = ("heldout_objective", "best_step", "phases", "base")
"""Entries that records of version 1 lack."""


@dataclass(frozen=True)
class Decision:
    """Which units are kept, and where the decision comes from.

    model: the name in the recipe; fingerprint: identifies the base model's config and weights; sparsity: the removed
    fraction of the prunable parameters; recipe: the resolved recipe as YAML; forward_passes: run by the search;
    calibration_forward_passes: run for scores, repair and the dense model, in batches of the search; heldout_loss: loss
    of the pruned and repaired model on held-out calibration text, in nats per token; dense_loss: the same for the dense
    model; heldout_objective: the objective of the search (`search.objective`) on that text; best_step: after how many
    steps the search made this decision, the best of those it evaluated on that text, or None if it evaluated none;
    repaired: the repaired blocks; budget: the budgeted `measure` and the fraction of it that is `kept`; bos:
    whether the windows of the calibration text begin with the BOS token, also those of the two losses; ancestors: the
    earlier decisions that made the base model, oldest first, if it was pruned already (see `ancestry`); phases: seconds
    by phase, in order (see `search/phases.py`). Those of the steps are of all starts of an interrupted search, the
    others of the last one. Empty in older decisions; base: the parts of the fingerprint (see `model/fingerprint.py`),
    to say what differs.
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
    repaired: RepairedBlocks = field(default_factory=dict)
    budget: dict[str, str | float] = field(default_factory=dict)
    dense_loss: float | None = None
    heldout_objective: float | None = None
    best_step: int | None = None
    bos: bool = False
    ancestors: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)

    def save(self, run: Path) -> None:
        """Write the decision into `run`. Every file is written atomically, and the record last. Raises OSError."""
        from safetensors.torch import save

        tensors = {}
        for index, layer in enumerate(self.model_mask):
            tensors[f"layers.{index}.attention"] = layer.attention
            tensors[f"layers.{index}.ffn"] = layer.ffn
        write_bytes(run / DECISION_MASKS, save(tensors))
        record = {name: getattr(self, name) for name in self._recorded()}
        if self.repaired:
            with new_file(run / REPAIR_FILE) as temporary:
                write_tensors(temporary, _flat(self.repaired))
        record["repair_sha256"] = checksum(run / REPAIR_FILE) if self.repaired else None
        record["kept"] = [{"attention": int(x.attention.sum()), "ffn": int(x.ffn.sum())} for x in self.model_mask]
        record["masks_sha256"] = checksum(run / DECISION_MASKS)
        record["pgprune"] = __version__
        record["version"] = VERSION
        write_record(run / DECISION_RECORD, record)

    def seconds_by_phase(self) -> str:
        """Return the seconds of every phase as text: `opening 3, scores 40`."""
        return ", ".join(f"{name} {seconds:,.0f}" for name, seconds in self.phases.items())

    @classmethod
    def _recorded(cls) -> list[str]:
        return [entry.name for entry in fields(cls) if entry.name not in ("model_mask", "repaired")]

    @classmethod
    def load(cls, run: Path, with_repair: bool = True) -> Decision:
        """Read the decision of a run.

        The checksum of a repair takes a while on a large model. Without `with_repair`, `repaired` is empty.

        Raises:
            UserError: the decision is missing or damaged, or its files do not belong together.
        """
        refuse_unfinished(run)
        record = _read_record(run, "Remove both files and search again.")
        tensors = read_tensors(run / DECISION_MASKS)
        try:
            model_mask = tuple(
                LayerMask(tensors[f"layers.{i}.attention"].to(torch.bool), tensors[f"layers.{i}.ffn"].to(torch.bool))
                for i in range(len(record["kept"]))
            )
            values = {name: record[name] for name in cls._recorded() if name in record or name not in LATER}
            repaired = _load_repaired(run, record) if with_repair else {}
            return cls(model_mask, **values, repaired=repaired)
        except KeyError as missing:
            raise _incomplete(run, missing) from None


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from: the name of the base `model` and the resolved `recipe` as YAML.

    fingerprint, base: of the base model, as in a Decision.
    """

    model: str
    recipe: str
    fingerprint: str
    base: dict[str, str]


def read_origin(model: Path) -> Origin | None:
    """Return the origin of an exported model, or None if its directory has no decision.

    The masks may be absent, because a model fetched from the hub comes without them.

    Raises:
        UserError: the decision is damaged.
    """
    if not (model / DECISION_RECORD).exists():
        return None
    record = _read_record(model, "Export the model again.")
    try:
        return Origin(record["model"], record["recipe"], record["fingerprint"], record.get("base", {}))
    except KeyError as missing:
        raise _incomplete(model, missing) from None


def kept_layers(model: Path) -> tuple[list[int], int] | None:
    """Return the layers of which an exported model keeps anything, and how many the dense model has.

    None if its directory has no decision. Raises UserError if the decision is damaged.
    """
    if not (model / DECISION_RECORD).exists():
        return None
    kept = _read_record(model, "Export the model again.").get("kept", [])
    return [index for index, counts in enumerate(kept) if any(counts.values())], len(kept)


def refuse_other_base(source: Source, decided: Decision | Origin, record: Path | str) -> None:
    """Raise UserError unless `source` is the model that was searched, naming the parts that differ.

    record: how to call the decision in the message.
    """
    parts = source.fingerprint_parts()
    if digest(parts) == decided.fingerprint:
        return
    if not decided.base:
        raise UserError(
            f"{record}: made by an earlier version of pgprune, whose fingerprint missed changes of single tensors. "
            f"Whether {source.name} is the model that was searched cannot be checked. Search again."
        )
    raise UserError(
        f"{source.name}: not the model that was searched. What differs: {difference(decided.base, parts)}. "
        "Restore the model's files or search again."
    )


ANCESTRY = ("model", "fingerprint", "sparsity", "recipe", "steps", "forward_passes", "budget")
"""What the record of a decision passes on to later decisions on the model that it made."""


def ancestry(model: Path) -> list[dict[str, Any]]:
    """Return the decisions that made the model in a directory, oldest first. Empty for a model that was never pruned.

    Each holds the entries of its record in ANCESTRY, and under `recovery` the record of the training that followed, or
    None.

    Raises:
        UserError: the decision or the recovery is damaged.
    """
    if not (model / DECISION_RECORD).exists():
        return []
    record = _read_record(model, "Export the model again.")
    recovery = model / RECOVERY_RECORD
    try:
        own: dict[str, Any] = {name: record[name] for name in ANCESTRY}
        own["recovery"] = read_record(recovery) if recovery.exists() else None
        return [*record["ancestors"], own]
    except KeyError as missing:
        raise _incomplete(model, missing) from None


def _read_record(run: Path, fix: str) -> dict[str, Any]:
    """Return the record. Raise UserError with the sentence `fix` if it does not match its checksum or the masks."""
    record = read_record(run / DECISION_RECORD)
    refuse_newer(run / DECISION_RECORD, record.get("version"), VERSION)
    if (run / DECISION_MASKS).exists() and checksum(run / DECISION_MASKS) != record.get("masks_sha256"):
        raise UserError(f"{run / DECISION_MASKS}: damaged, or not the masks that {DECISION_RECORD} describes. {fix}")
    return record


def _incomplete(run: Path, missing: KeyError) -> UserError:
    return UserError(f"{run / DECISION_RECORD}: damaged: {missing} is missing.")


def _flat(repaired: RepairedBlocks) -> dict[str, torch.Tensor]:
    """Return the repaired weights and biases by their names in the repair file."""
    flat = {}
    for (index, name), block in repaired.items():
        for key, value in (("weight", block.weight), ("bias", block.bias), *block.inner.items()):
            if value is not None:
                flat[f"layers.{index}.{name}.{key}"] = value
    return flat


def _load_repaired(run: Path, record: dict[str, Any]) -> RepairedBlocks:
    expected_checksum = record["repair_sha256"]
    if expected_checksum is None:
        return {}
    if not (run / REPAIR_FILE).exists() or checksum(run / REPAIR_FILE) != expected_checksum:
        raise UserError(
            f"{run / REPAIR_FILE}: missing, damaged, or not the repair that {DECISION_RECORD} describes. Search again."
        )
    return RepairFile(run / REPAIR_FILE)


class RepairFile(Mapping[tuple[int, str], RepairedBlock]):
    """The repaired blocks in a file. Each one is read when it is needed, because together they can be very large."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = set(file.keys())

    def __getitem__(self, key: tuple[int, str]) -> RepairedBlock:
        from safetensors import safe_open

        prefix = f"layers.{key[0]}.{key[1]}."
        names = sorted(name for name in self._names if name.startswith(prefix))
        if f"{prefix}weight" not in names:
            raise KeyError(key)
        with safe_open(self.path, framework="pt") as file:
            parts = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        return RepairedBlock(parts.pop("weight"), parts.pop("bias", None), parts)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for name in sorted(self._names):
            _, index, block, part = name.split(".", 3)
            if part == "weight":
                yield int(index), block

    def __len__(self) -> int:
        return sum(1 for _ in self)
