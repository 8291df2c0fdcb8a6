"""`scores.safetensors`: the saliency of every unit, by which metric and of which model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pgprune_cli.atomic import read_tensors, write_bytes
from pgprune_cli.errors import UserError
from pgprune_cli.recipe import MetricName
from pgprune_cli.run_files import SCORES


@dataclass(frozen=True)
class Scores:
    """Saliencies of a model: `layers.<l>.attention` `(kv groups,)`, `layers.<l>.ffn` `(channels,)`, float64."""

    tensors: dict[str, Tensor]
    metric: MetricName
    fingerprint: str

    def save(self, run: Path) -> Path:
        about = {"metric": self.metric, "fingerprint": self.fingerprint}
        write_bytes(run / SCORES, save(self.tensors, metadata=about))
        return run / SCORES

    @classmethod
    def load(cls, run: Path) -> Scores:
        """Raises UserError when the file is damaged or not ours."""
        tensors = read_tensors(run / SCORES)
        with safe_open(run / SCORES, "pt") as file:
            about = file.metadata() or {}
        if about.get("metric") not in get_args(MetricName) or "fingerprint" not in about:
            raise UserError(f"{run / SCORES}: not scores of pgprune; `pgprune init-scores` writes them")
        return cls(tensors, cast(MetricName, about["metric"]), about["fingerprint"])
