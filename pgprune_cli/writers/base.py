"""The base of an export: its config, and its tensors shard by shard, never more than one shard in memory.

A GGUF base is the exception: transformers unpacks it as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pgprune_cli.arch import Keep, Shape
from pgprune_cli.atomic import read_json
from pgprune_cli.decision import Decision
from pgprune_cli.errors import UserError
from pgprune_cli.loading import Source, load_model, load_tokenizer

SIDE_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""What is copied from a base directory as it is."""

GGUF_SHARD = 4 * 10**9
"""Bytes of unpacked weights in one shard where the base is a GGUF file."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Shard:
    """A run of the base's tensors: their shapes, and a context that gives their values by name."""

    shapes: Mapping[str, torch.Size]
    open: Callable[[], AbstractContextManager[Callable[[str], Tensor]]]


@dataclass(frozen=True)
class Base:
    """A dense model as files: `json` is its config.json, `config` what transformers reads it as; `bytes` of weights."""

    json: dict[str, Any]
    config: Any
    shape: Shape
    shards: tuple[Shard, ...]
    bytes: int
    write_side_files: Callable[[Path], None]


def open_base(source: Source, decision: Decision) -> Base:
    """Raises UserError where the base is quantised, incomplete, or not of the decision's sizes."""
    base, model = _from_directory(source) if source.gguf is None else _from_gguf(source, decision)
    _check(source.name, base, model, decision.keep)
    return base


def _from_directory(source: Source) -> tuple[Base, nn.Module]:
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    given = read_json(source.directory / "config.json")
    if "quantization_config" in given:
        raise UserError(f"{source.name}: holds quantised weights, which cannot be cut; export from the original ones")
    try:
        config = AutoConfig.from_pretrained(source.directory)
        with torch.device("meta"):
            model = build(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source.name}: its config.json cannot be used: {error}") from error
    files = source.weight_files()
    shards = [_shard_of(path) for path in files]
    if config.tie_word_embeddings and _is_duplicate(shards):
        shards = [_without(shard, HEAD) for shard in shards]

    def write_side_files(directory: Path) -> None:
        for pattern in SIDE_FILES:
            for path in source.directory.glob(pattern):
                target = directory / path.relative_to(source.directory)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)

    size = sum(path.stat().st_size for path in files)
    return Base(given, config, Shape.of(model), tuple(shards), size, write_side_files), model


def _shard_of(path: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    @contextmanager
    def tensors() -> Iterator[Callable[[str], Tensor]]:
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not safetensors ({error})") from None
    # Old checkpoints hold this buffer; it is computed nowadays.
    return Shard({name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}, tensors)


def _is_duplicate(shards: list[Shard]) -> bool:
    """Whether the head holds what the embedding holds. Where it differs, transformers does not tie them either."""
    pair = []
    for wanted in (EMBEDDING, HEAD):
        for shard in shards:
            if wanted in shard.shapes:
                with shard.open() as read:
                    pair.append(read(wanted))
    return len(pair) == 2 and torch.equal(*pair)


def _without(shard: Shard, name: str) -> Shard:
    return Shard({key: shape for key, shape in shard.shapes.items() if key != name}, shard.open)


def _from_gguf(source: Source, decision: Decision) -> tuple[Base, nn.Module]:
    dtype = yaml.safe_load(decision.recipe)["dtype"]
    model: Any = load_model(source, dtype, "cpu")
    given = json.loads(model.config.to_json_string())
    given |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    runs: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > GGUF_SHARD and runs[-1]:
            runs.append({})
            size = 0
        runs[-1][name] = tensor.shape
        size += tensor.nbytes

    def write_side_files(directory: Path) -> None:
        load_tokenizer(source).save_pretrained(directory)
        model.generation_config.save_pretrained(directory)

    shards = tuple(Shard(run, lambda: nullcontext(tensors.__getitem__)) for run in runs)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Base(given, model.config, Shape.of(model), shards, total, write_side_files), model


def _check(name: str, base: Base, model: nn.Module, keep: Keep) -> None:
    """Raises UserError unless the decision and the weights have the sizes that the config says."""
    decided = [(len(layer.attention), len(layer.ffn)) for layer in keep]
    if decided != list(zip(base.shape.kv_groups, base.shape.channels, strict=True)):
        raise UserError(f"{name}: has other layers, KV groups or FFN channels than the decision was made for")
    found = {key: shape for shard in base.shards for key, shape in shard.shapes.items()}
    for key, tensor in model.state_dict().items():
        if key == HEAD and key not in found and base.config.tie_word_embeddings:
            continue
        if found.get(key) != tensor.shape:
            shape = "is missing" if key not in found else f"has the shape {tuple(found[key])}"
            raise UserError(f"{name}: the tensor {key} {shape}; by the config it should be {tuple(tensor.shape)}")
