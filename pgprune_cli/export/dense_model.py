"""The base of an export: its config, and its tensors shard by shard, never more than one shard in memory.

A GGUF base is the exception: transformers unpacks it as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pgprune_cli.errors import UserError
from pgprune_cli.export.safetensors_file import DTYPES
from pgprune_cli.model.families.adapter import ModelFamily
from pgprune_cli.model.loading import load_model, load_tokenizer, read_config, reason_of
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel, Shape
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision
from pgprune_cli.storage.records import read_json, write_json

SIDE_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""What is copied from a base directory as it is."""


@dataclass(frozen=True)
class Shard:
    """A run of the base's tensors: meta tensors of their shapes and dtypes, and a context that gives them by name."""

    tensors: Mapping[str, Tensor]
    open: Callable[[], AbstractContextManager[Callable[[str], Tensor]]]


@dataclass(frozen=True)
class Base:
    """A dense model as files: `json` is its config.json, `config` what transformers reads it as."""

    json: dict[str, Any]
    config: Any
    shape: Shape
    shards: tuple[Shard, ...]
    write_side_files: Callable[[Path], None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Meta tensors of all that the base holds, by name, shard after shard."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """These tensors in turn. One shard is open at a time, so names had best come shard by shard."""
        places = {name: place for place, shard in enumerate(self.shards) for name in shard.tensors}
        for place, run in groupby(names, places.__getitem__):
            with self.shards[place].open() as tensor:
                yield from map(tensor, run)


def open_dense_model(source: Source, decision: Decision) -> Base:
    """Raises UserError where the base is quantised, incomplete, or not of the decision's sizes."""
    base, model = _from_directory(source) if source.gguf is None else _from_gguf(source, decision)
    _check(source.name, base, model, decision.model_mask)
    return base


def _from_directory(source: Source) -> tuple[Base, nn.Module]:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    given = read_json(source.directory / "config.json")
    if "quantization_config" in given:
        raise UserError(f"{source.name}: holds quantised weights, which cannot be cut; export from the original ones")
    config = read_config(source)
    try:
        with torch.device("meta"):
            model = build(config)
    except Exception as error:  # of dozens of kinds
        raise UserError(f"{source.name}: its config.json cannot be used: {reason_of(error)}") from error
    files = source.weight_files()
    shards = [_shard_of(path) for path in files]
    shape = PrunableModel.of(model).shape
    if config.tie_word_embeddings and _is_duplicate(shards, shape.family):
        shards = [_without(shard, shape.family.head_weight) for shard in shards]

    def write_side_files(directory: Path) -> None:
        for path in side_files(source.directory):
            target = directory / path.relative_to(source.directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        drop_code(directory / "tokenizer_config.json")

    return Base(given, config, shape, tuple(shards), write_side_files), model


def side_files(directory: Path) -> list[Path]:
    """What of a base directory is copied as it is: no code, which would run where the export is trusted."""
    found = {path for pattern in SIDE_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".py")


def drop_code(path: Path) -> None:
    """Takes the classes that a tokenizer's config would have loaded from code out of it."""
    try:
        config = read_json(path)
    except UserError:  # absent, or no config that could name any
        return
    if config.pop("auto_map", None) is not None:
        write_json(path, config)


def _shard_of(path: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    @contextmanager
    def tensors() -> Iterator[Callable[[str], Tensor]]:
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor

    try:
        with safe_open(path, framework="pt") as file:
            # Old checkpoints hold rotary_emb.inv_freq; it is computed nowadays.
            found = {
                name: _described(path, name, file.get_slice(name))
                for name in file.keys()  # noqa: SIM118
                if not name.endswith("rotary_emb.inv_freq")
            }
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not safetensors ({error})") from None
    return Shard(found, tensors)


def _described(path: Path, name: str, part: Any) -> Tensor:
    """The meta tensor of a slice that the safetensors library gives."""
    if part.get_dtype() not in DTYPES:
        raise UserError(
            f"{path}: {name} is of dtype {part.get_dtype()}; weights that can be cut are {', '.join(DTYPES)}"
        )
    return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def _is_duplicate(shards: list[Shard], family: ModelFamily) -> bool:
    """Whether the head holds what the embedding holds. Where it differs, transformers does not tie them either."""
    pair = []
    for wanted in (family.embedding_weight, family.head_weight):
        for shard in shards:
            if wanted in shard.tensors:
                with shard.open() as read:
                    pair.append(read(wanted))
    return len(pair) == 2 and torch.equal(*pair)


def _without(shard: Shard, name: str) -> Shard:
    return Shard({key: tensor for key, tensor in shard.tensors.items() if key != name}, shard.open)


def _from_gguf(source: Source, decision: Decision) -> tuple[Base, nn.Module]:
    dtype = yaml.safe_load(decision.recipe)["dtype"]
    model: Any = load_model(source, dtype, "cpu")
    given = json.loads(model.config.to_json_string())
    given |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    shape = PrunableModel.of(model).shape
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop(shape.family.head_weight, None)

    def write_side_files(directory: Path) -> None:
        load_tokenizer(source).save_pretrained(directory)
        model.generation_config.save_pretrained(directory)

    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shard = Shard(meta, lambda: nullcontext(tensors.__getitem__))
    return Base(given, model.config, shape, (shard,), write_side_files), model


def _check(name: str, base: Base, model: nn.Module, keep: ModelMask) -> None:
    """Raises UserError unless the decision and the weights have the sizes that the config says."""
    decided = {name: tuple(len(layer.of(name)) for layer in keep) for name in base.shape.units}
    if decided != base.shape.units:
        raise UserError(f"{name}: has other layers, KV heads or FFN channels than the decision was made for")
    found = base.tensors
    for key, tensor in model.state_dict().items():
        if key == base.shape.family.head_weight and key not in found and base.config.tie_word_embeddings:
            continue
        if key not in found or found[key].shape != tensor.shape:
            shape = "is missing" if key not in found else f"has the shape {tuple(found[key].shape)}"
            raise UserError(f"{name}: the tensor {key} {shape}; by the config it should be {tuple(tensor.shape)}")
