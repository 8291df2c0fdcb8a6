"""Export to a transformers model directory: the decision replayed on the base's weights, a tensor at a time.

A model whose layers all have the same sizes is written as a stock one; any other takes `modeling_pruned.py` along.
Either way its logits are those of the masked dense model, with the repaired outputs where there was a repair.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgprune_cli.export import safetensors_file as weights
from pgprune_cli.export.checksums import write_checksums
from pgprune_cli.export.hf_config import config_of
from pgprune_cli.export.model_card import ModelCard
from pgprune_cli.export.plan import SLACK, Measured, Options, Plan, check_new, check_space, operate
from pgprune_cli.export.surgery import Cut
from pgprune_cli.model.source import INDEX, Source
from pgprune_cli.run.decision import Decision
from pgprune_cli.serving import modeling_pruned
from pgprune_cli.storage.atomic import new_directory, write_bytes
from pgprune_cli.storage.records import write_json


@dataclass(frozen=True)
class DirectoryPlan(Plan):
    """config: of config.json; code: the modelling files that travel."""

    config: Mapping[str, Any]
    code: tuple[Path, ...]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def stock(self) -> bool:
        """Whether transformers needs no code for it."""
        return "per_layer_config" not in self.config

    @property
    def bytes(self) -> int:
        return sum(len(weights.header(cuts)) + sum(map(weights.bytes_of, cuts)) for cuts in self.files.values())

    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        out = out.expanduser().resolve()
        check_new(out, directory=True)
        check_space(out, self.bytes + SLACK)
        with new_directory(out) as directory:
            write_json(directory / "config.json", self.config)
            for name, cuts in self.files.items():
                weights.write(directory / name, cuts, self.tensors(cuts, on_bytes))
            places = {cut.name: name for name, cuts in self.files.items() for cut in cuts}
            total = sum(map(weights.bytes_of, self.cuts))
            # For a single file too: without an index, servers take decision.safetensors for weights.
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
            self.base.write_side_files(directory)
            for file in self.code:
                shutil.copyfile(file, directory / file.name)
            # The repaired outputs are in the weights; a second time they could double the size.
            dataclasses.replace(self.decision, outputs={}).save(directory)
            write_bytes(directory / "README.md", self._card(out.name).text(self.decision).encode())
            write_checksums(directory)

    def _card(self, title: str) -> ModelCard:
        kept = [(int(k.attention.sum()), len(k.attention), int(k.ffn.sum()), len(k.ffn)) for k in self.form.kept]
        padded = self.sparsity if self.form.padded else None
        before, after = self.parameters_before, self.parameters_after
        return ModelCard(title, kept, before, after, padded, not self.stock, "model_file" in self.config, self.measured)


def plan(source: Source, decision: Decision, options: Options, measured: Measured | None = None) -> DirectoryPlan:
    """The plan of a model directory; reads no weights. Raises UserError as `operate` does."""
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    base, surgery = operate(source, decision, options.needs, dtype)
    config = config_of(base.json, base.config, surgery.form, surgery.new_biases, options.dtype)
    code = (Path(modeling_pruned.__file__),) if "per_layer_config" in config else ()
    files = _files(surgery.cuts(), options.shard_size)
    return DirectoryPlan(base, decision, surgery, files, measured, config, code)


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
