"""The decision: which units stay, in which model, under which budget, from which recipe. Small and replayable.

`decision.safetensors` holds a bool tensor `layers.<l>.attention` (over KV groups) and `layers.<l>.ffn` (over channels)
for every layer; `decision.json` says where it comes from, and carries the checksum of the masks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pgprune_cli import __version__
from pgprune_cli.arch import Keep, LayerKeep
from pgprune_cli.atomic import checksum, read_json, read_tensors, write_bytes, write_json
from pgprune_cli.errors import UserError

MASKS = "decision.safetensors"
RECORD = "decision.json"


@dataclass(frozen=True)
class Decision:
    """A keep decision and its origin.

    model: as the recipe names it; fingerprint: of the base's config and weights; sparsity: the fraction of the
    prunable parameters that is removed in fact; recipe: the resolved recipe as YAML; forwards: model evaluations spent
    on the search; heldout_loss: of the hard mask on held-out calibration text, nats per token.
    """

    keep: Keep
    model: str
    fingerprint: str
    sparsity: float
    recipe: str
    steps: int
    forwards: int
    heldout_loss: float | None

    def save(self, run: Path) -> None:
        """Writes both files into `run`, each whole or not at all; the record, which names the masks, last."""
        from safetensors.torch import save

        tensors = {}
        for index, layer in enumerate(self.keep):
            tensors[f"layers.{index}.attention"] = layer.attention
            tensors[f"layers.{index}.ffn"] = layer.ffn
        write_bytes(run / MASKS, save(tensors))
        record = {key: value for key, value in asdict(self).items() if key != "keep"}
        record["kept"] = [{"attention": int(x.attention.sum()), "ffn": int(x.ffn.sum())} for x in self.keep]
        record["masks_sha256"] = checksum(run / MASKS)
        record["pgprune"] = __version__
        write_json(run / RECORD, record)

    @classmethod
    def load(cls, run: Path) -> Decision:
        """Reads a decision. Raises UserError when it is missing, damaged or does not belong together."""
        if not (run / RECORD).exists() or not (run / MASKS).exists():
            raise UserError(f"{run}: no finished decision here; `pgprune search` writes {MASKS} and {RECORD}")
        record = read_json(run / RECORD)
        if checksum(run / MASKS) != record.get("masks_sha256"):
            raise UserError(f"{run / MASKS}: damaged, or not the masks that {RECORD} describes; run the search again")
        tensors = read_tensors(run / MASKS)
        try:
            keep = tuple(
                LayerKeep(tensors[f"layers.{i}.attention"].to(torch.bool), tensors[f"layers.{i}.ffn"].to(torch.bool))
                for i in range(len(record["kept"]))
            )
            return cls(keep, **{name: record[name] for name in cls.__dataclass_fields__ if name != "keep"})
        except KeyError as missing:
            raise UserError(f"{run / RECORD}: {missing} is missing; the file is not a whole decision") from None
