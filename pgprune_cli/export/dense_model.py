"""The base model of an export: its config, and its tensors, with never more than one shard in memory.

A GGUF model is the exception: transformers unpacks it as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import ModelFamily
from pgprune_cli.model.families.wrapper import SECTION, decoder_prefixes
from pgprune_cli.model.generation import allow_sampling, repair_generation_config
from pgprune_cli.model.loading import load_model, read_config
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel, Shape, unit_tensors
from pgprune_cli.model.source import Source
from pgprune_cli.model.stored import StoredFile, refuse_incomplete, stored_files
from pgprune_cli.model.tokenizer_files import write_tokenizer
from pgprune_cli.model.unit_tensors import UnitTensor
from pgprune_cli.model.weights import reason_of
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import DECISION_RECORD
from pgprune_cli.storage.records import read_json, write_json

AUXILIARY_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
    "*processor_config.json",
)
"""Patterns of the files that are copied unchanged from the base model's directory: tokenizer, processor, licence."""


@dataclass(frozen=True)
class Shard:
    """Some tensors of the base model that are read together.

    tensors: by name, on the meta device; open: a context manager that gives a function from a name to its tensor.
    """

    tensors: Mapping[str, Tensor]
    open: Callable[[], AbstractContextManager[Callable[[str], Tensor]]]


@dataclass(frozen=True)
class DenseModel:
    """A dense model as files.

    json: its config.json, for a model of text and images the section about its decoder; config: the transformers config
    read from it; unit_tensors: by name, the tensors whose rows belong to elements; write_auxiliary_files: puts
    tokenizer, chat template and licence into a directory; wrapper: the whole config.json of a model of text and images;
    prefixes: by a tensor's name in the causal model, what the names of the decoder's tensors begin with, there and in
    the files; room: how many of its parameters are none of the model's, but zeros to pad with (room.py).
    """

    json: dict[str, Any]
    config: Any
    shape: Shape
    unit_tensors: Mapping[str, UnitTensor]
    shards: tuple[Shard, ...]
    write_auxiliary_files: Callable[[Path], None]
    wrapper: dict[str, Any] | None = None
    prefixes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    room: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, on the meta device, shard after shard."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    def stored_name(self, edit_name: str, source: str) -> str:
        """Return what a tensor is called in the files, given its name in the causal model and its source's."""
        if source not in self.prefixes:
            return edit_name
        ours, stored = self.prefixes[source]
        return stored + edit_name.removeprefix(ours)

    def decoder_alone(self) -> DenseModel:
        """Return the model without the tensors outside the decoder, if it is a model of text and images."""
        if self.wrapper is None:
            return self
        shards = tuple(
            replace(shard, tensors={name: shard.tensors[name] for name in shard.tensors if name in self.prefixes})
            for shard in self.shards
        )
        return replace(self, shards=shards)

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield these tensors in turn. One shard is open at a time, so reading is fastest in the order of `tensors`."""
        shard_of = {name: index for index, shard in enumerate(self.shards) for name in shard.tensors}
        for index, names_in_shard in groupby(names, shard_of.__getitem__):
            with self.shards[index].open() as tensor:
                yield from map(tensor, names_in_shard)


def open_dense_model(source: Source, decision: Decision) -> DenseModel:
    """Return the base model that a decision was made for.

    Raises UserError if it is quantised or incomplete, or does not have the sizes of the decision.
    """
    base = open_directory(source) if source.gguf is None else _from_gguf(source, decision)
    _check_sizes(source.name, base, decision.model_mask)
    return base


def open_directory(source: Source) -> DenseModel:
    """Return the model in a directory, dense or pruned. Raises UserError if it is quantised or incomplete."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    config_json, wrapper = read_json(source.directory / "config.json"), None
    if "quantization_config" in config_json:
        raise UserError(
            f"{source.name}: holds quantised weights, which cannot be pruned. Export from the original model."
        )
    config = read_config(source)
    if source.is_wrapped:
        config_json, wrapper = {"model_type": config.model_type} | config_json[SECTION], config_json
    try:
        with torch.device("meta"):
            model = build(config)
    except Exception as error:  # transformers raises dozens of kinds for configs that are wrong
        raise UserError(f"{source.name}: no model can be built from its config.json: {reason_of(error)}.") from error
    prunable = PrunableModel.of(model)
    shape = prunable.shape
    files = stored_files(source, model)
    refuse_incomplete(source.name, files, prunable)
    head = shape.family.head_weight
    if config.tie_word_embeddings and any(head in file.tensors for file in files):
        if _head_equals_embedding(files, shape.family):
            files = [file.without(head) for file in files]
        else:  # transformers 5 unties the two, but other runtimes tie them if the config says so
            for untied in (config_json, wrapper or {}):
                untied["tie_word_embeddings"] = False
            config.tie_word_embeddings = False
    prefixes = _wrapped_prefixes(files) if source.is_wrapped else {}
    shards = [Shard(file.tensors, file.open) for file in files]

    def write_auxiliary_files(directory: Path) -> None:
        for path in auxiliary_files(source.directory):
            target = directory / path.relative_to(source.directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        remove_code_references(directory / "tokenizer_config.json")
        write_tokenizer(source, directory)
        repair_generation_config(directory)

    tensors = unit_tensors(prunable)
    return DenseModel(config_json, config, shape, tensors, tuple(shards), write_auxiliary_files, wrapper, prefixes)


def auxiliary_files(directory: Path) -> list[Path]:
    """Return the files that are copied unchanged. Code is not: it would run on the machine of anyone who trusts it."""
    matches = {path for pattern in AUXILIARY_FILES for path in directory.glob(pattern)}
    return sorted(path for path in matches if path.is_file() and path.suffix != ".py")


def remove_code_references(path: Path) -> None:
    """Remove `auto_map` from a tokenizer's config: it names classes in code that is not copied."""
    try:
        config = read_json(path)
    except UserError:  # absent or not JSON, so it names no code either
        return
    if config.pop("auto_map", None) is not None:
        write_json(path, config)


def _wrapped_prefixes(files: Sequence[StoredFile]) -> dict[str, tuple[str, str]]:
    """Return the prefixes of every tensor of the decoder, as a DenseModel has them, in a model of text and images."""
    pairs = {name: decoder_prefixes(stored) for file in files for name, stored in file.names.items()}
    prefixes = {name: (pair[1], pair[0]) for name, pair in pairs.items() if pair is not None}
    body = next((prefix for prefix in prefixes.values() if prefix[0] == "model."), ("", ""))
    # A head that is stored for both tied weights is named as the embedding is.
    return {name: prefix if name.startswith(prefix[0]) else body for name, prefix in prefixes.items()}


def _head_equals_embedding(files: Sequence[StoredFile], family: ModelFamily) -> bool:
    """Return True if the files hold both the head and the embedding, and the two are equal."""
    tensors = []
    for name in (family.embedding_weight, family.head_weight):
        for file in files:
            if name in file.tensors:
                with file.open() as read:
                    tensors.append(read(name))
    return len(tensors) == 2 and torch.equal(*tensors)


def _from_gguf(source: Source, decision: Decision) -> DenseModel:
    dtype = yaml.safe_load(decision.recipe)["dtype"]
    model: Any = load_model(source, dtype, "cpu")
    config_json = json.loads(model.config.to_json_string())
    config_json |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    prunable = PrunableModel.of(model)
    shape = prunable.shape
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop(shape.family.head_weight, None)

    def write_auxiliary_files(directory: Path) -> None:
        write_tokenizer(source, directory)
        allow_sampling(model.generation_config)
        model.generation_config.save_pretrained(directory)

    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shard = Shard(meta, lambda: nullcontext(tensors.__getitem__))
    return DenseModel(config_json, model.config, shape, unit_tensors(prunable), (shard,), write_auxiliary_files)


def _check_sizes(name: str, base: DenseModel, model_mask: ModelMask) -> None:
    """Raise UserError unless the decision has the layers and units of the base model."""
    decided = {block: tuple(len(layer.of(block)) for layer in model_mask) for block in base.shape.elements}
    if decided != base.shape.elements:
        units = " or ".join(block.element_name for block in base.shape.family.kinds)
        raise UserError(
            f"{name}: its number of layers, {units} differs from {DECISION_RECORD}. "
            "Export the run that searched this model."
        )
