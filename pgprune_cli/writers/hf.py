"""Export to a transformers model directory: the decision replayed on the base's weights, shard by shard.

Layers with neither heads nor channels are dropped. A model whose layers then all have the same sizes is written as a
stock one; any other takes `modeling_pruned.py` along. Either way its logits are those of the masked dense model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pgprune_cli.atomic import sync_directory, write_bytes, write_json
from pgprune_cli.decision import Decision
from pgprune_cli.errors import UserError
from pgprune_cli.loading import INDEX, Source
from pgprune_cli.writers import modeling_pruned
from pgprune_cli.writers.base import Base, Shard, open_base
from pgprune_cli.writers.card import Card
from pgprune_cli.writers.surgery import Cut, Surgery

SLACK = 64 * 2**20
"""Bytes of disk asked for on top of the weights: tokenizer, card, decision."""


@dataclass(frozen=True)
class Written:
    """What an export came to. `bytes` counts the weight files; tied parameters count once; `stock`: no code travels."""

    directory: Path
    model_type: str
    stock: bool
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    bytes: int


def write(
    source: Source,
    decision: Decision,
    out: Path,
    measured: Mapping[str, Any] | None,
    on_shard: Callable[[int, int], None],
) -> Written:
    """Writes the pruned model into the new directory `out`; on any failure nothing of it is left.

    `measured` is the object of `pgprune eval`, for the card. `on_shard(done, total)` follows every weight file.

    Raises:
        UserError: `out` exists and is not an empty directory; the base is not the one that the decision was made for,
            or is quantised or incomplete; nothing is kept; the disk is too full.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty directory")
    check_base(source, decision)
    base = open_base(source, decision)
    _check_biases(base, decision)
    surgery = Surgery(base.shape.spec, decision.keep, decision.outputs)
    config = surgery.config(base.json, base.config)
    stock = "per_layer_config" not in config
    shards = [(shard, surgery.cuts(shard.shapes)) for shard in base.shards]
    before = sum(size.numel() for shard in base.shards for size in shard.shapes.values())
    after = sum(cut.numel(shard.shapes[name]) for shard, cuts in shards for name, cut in cuts.items())
    check_space(out, base.bytes * after // before + SLACK)

    with _new_directory(out) as directory:
        write_json(directory / "config.json", config)
        size = _write_weights(directory, [(shard, cuts) for shard, cuts in shards if cuts], on_shard)
        base.write_side_files(directory)
        if not stock:
            shutil.copyfile(modeling_pruned.__file__, directory / Path(modeling_pruned.__file__).name)
        decision.save(directory)
        layers = [(int(k.attention.sum()), len(k.attention), int(k.ffn.sum()), len(k.ffn)) for k in decision.keep]
        card = Card(out.name, layers, before, after, not stock, measured)
        write_bytes(directory / "README.md", card.text(decision).encode())
    layers_after = config["num_hidden_layers"]
    return Written(out, config["model_type"], stock, len(decision.keep), layers_after, before, after, size)


def check_base(source: Source, decision: Decision) -> None:
    """Raises UserError unless the decision was made for this very model."""
    fingerprint = source.fingerprint()
    if fingerprint != decision.fingerprint:
        raise UserError(
            f"{source.name}: not the model that was searched: its config and weights have the fingerprint "
            f"{fingerprint}, the decision was made for {decision.fingerprint}"
        )


def _check_biases(base: Base, decision: Decision) -> None:
    """A repair may have fitted a bias where the base has none, and its architecture then has no place for it."""
    found = {name for shard in base.shards for name in shard.shapes}
    for (index, name), output in decision.outputs.items():
        block = dict(base.shape.spec.blocks())[name]
        bias = f"{base.shape.spec.layers}.{index}.{block.module}.{block.output.name}.bias"
        if output.bias is not None and bias not in found:
            raise UserError(
                f"{bias}: the repair has fitted this bias, for which the base model has no place; "
                "search with reconstruct.method: least-squares"
            )


def _write_weights(
    directory: Path, shards: list[tuple[Shard, dict[str, Cut]]], on_shard: Callable[[int, int], None]
) -> int:
    """Writes one file for each shard, and the index where they are several. Returns the bytes of the files."""
    weight_map: dict[str, str] = {}
    total_size = file_size = 0
    for number, (shard, cuts) in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        total_size += _write_shard(directory / name, shard, cuts)
        file_size += (directory / name).stat().st_size
        weight_map |= {cut.name: name for cut in cuts.values()}
        on_shard(number, len(shards))
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return file_size


def _write_shard(path: Path, shard: Shard, cuts: Mapping[str, Cut]) -> int:
    """Writes what is left of one shard; its tensors are freed on return. Returns the bytes of the tensors."""
    from safetensors.torch import save_file

    with shard.open() as read:
        tensors: dict[str, Tensor] = {cut.name: cut.apply(read(name)) for name, cut in cuts.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read.
    shutil.copymode(path.with_name("config.json"), path)
    return sum(tensor.nbytes for tensor in tensors.values())


def check_space(out: Path, needed: int) -> None:
    """Raises UserError where `needed` bytes for `out` are more than the disk has."""
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
