"""`scores.safetensors`: the score of every element of every block, the metric that computed it, and the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from safetensors.torch import save
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.schema import MetricName
from pgprune_cli.run.layout import SCORES_FILE
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import metadata, read_tensors, refuse_newer, with_checksum

ABOUT = "pgprune"
VERSION = 1


@dataclass(frozen=True)
class Scores:
    """The scores of a model, float64: `layers.<l>.attention` `(query heads,)` and `layers.<l>.ffn` `(channels,)`.

    units: how many units a unit search has in every layer, by block: KV heads, and channels or experts.
    """

    tensors: dict[str, Tensor]
    metric: MetricName
    fingerprint: str
    units: dict[str, list[int]]

    def save(self, run: Path) -> Path:
        """Write the scores into `run` and return the file. Raises OSError."""
        about: dict[str, Any] = {"metric": self.metric, "fingerprint": self.fingerprint, "version": VERSION}
        about["units"] = self.units
        about["tensors_sha256"] = _digest(self.tensors)
        # a single entry, because the library writes several in varying order
        write_bytes(run / SCORES_FILE, save(self.tensors, metadata={ABOUT: json.dumps(with_checksum(about))}))
        return run / SCORES_FILE

    @classmethod
    def load(cls, run: Path) -> Scores:
        """Read the scores of a run. Raises UserError if the file is damaged or was not written by pgprune."""
        path = run / SCORES_FILE
        tensors, entries = read_tensors(path), metadata(path)
        if ABOUT not in entries:
            raise UserError(f"{path}: not a score file of pgprune. Write one with `pgprune init-scores`.")
        about = _checked(path, entries[ABOUT], tensors)
        if about.get("metric") not in get_args(MetricName) or not {"fingerprint", "units"} <= about.keys():
            raise UserError(f"{path}: not a score file of pgprune. Write one with `pgprune init-scores`.")
        return cls(tensors, cast(MetricName, about["metric"]), about["fingerprint"], about["units"])


def _checked(path: Path, text: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the metadata of the scores. Raise UserError if it or the tensors do not match their checksums."""
    try:
        about = json.loads(text)
        if about != with_checksum(about) or about["tensors_sha256"] != _digest(tensors):
            raise ValueError
    except (ValueError, AttributeError, KeyError):
        raise UserError(f"{path}: damaged: it does not match its checksum. Run `pgprune init-scores` again.") from None
    refuse_newer(path, about.get("version"), VERSION)
    return cast(dict[str, Any], about)


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()
