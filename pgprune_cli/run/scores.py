"""`scores.safetensors`: the scores of every unit, by which metric and of which model."""

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
    """Saliencies of a model: `layers.<l>.attention` `(kv groups,)`, `layers.<l>.ffn` `(channels,)`, float64."""

    tensors: dict[str, Tensor]
    metric: MetricName
    fingerprint: str

    def save(self, run: Path) -> Path:
        about = {"metric": self.metric, "fingerprint": self.fingerprint, "version": VERSION}
        about["tensors_sha256"] = _digest(self.tensors)
        # of several entries, the library writes them now in this order, now in that
        write_bytes(run / SCORES_FILE, save(self.tensors, metadata={ABOUT: json.dumps(with_checksum(about))}))
        return run / SCORES_FILE

    @classmethod
    def load(cls, run: Path) -> Scores:
        """Raises UserError when the file is damaged or not ours."""
        path = run / SCORES_FILE
        tensors, found = read_tensors(path), metadata(path)
        if ABOUT not in found:
            raise UserError(f"{path}: these are not scores of pgprune. Write them with `pgprune init-scores`.")
        about = _whole(path, found[ABOUT], tensors)
        if about.get("metric") not in get_args(MetricName) or "fingerprint" not in about:
            raise UserError(f"{path}: these are not scores of pgprune. Write them with `pgprune init-scores`.")
        return cls(tensors, cast(MetricName, about["metric"]), about["fingerprint"])


def _whole(path: Path, text: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What scores say of themselves. Raises UserError where they are not what was written."""
    try:
        about = json.loads(text)
        if about != with_checksum(about) or about["tensors_sha256"] != _digest(tensors):
            raise ValueError
    except (ValueError, AttributeError, KeyError):
        raise UserError(f"{path}: damaged: not what was written; run `pgprune init-scores` again") from None
    refuse_newer(path, about.get("version"), VERSION)
    return cast(dict[str, Any], about)


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()
