"""The tensors in a model's safetensors files, under the names that the model gives them.

This is the one place that maps names. It reads what transformers reads: names without the prefix of the base model
(`layers.0…`) or with one too many (`model.model.layers.0…`), a decoder inside a wrapper, one matrix per expert, and
tied weights of which only the head is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.errors import UserError
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import ModelFamily
from pgprune_cli.model.families.wrapper import decoder_name, has_wrapped_names
from pgprune_cli.model.prunable import PrunableModel, unit_tensors
from pgprune_cli.model.source import Source
from pgprune_cli.model.unit_tensors import UnitTensor
from pgprune_cli.storage.safetensors_file import DTYPES, stored_tensors

Place = tuple[str, int | None, int | None]
"""A tensor of the model, or one group's rows of one of its parts, as files of experts hold them."""


@dataclass(frozen=True)
class StoredFile:
    """A weight file.

    names: by a tensor's name in the model, its name in the file; tensors: by its name in the model, its shape and
    dtype, on the meta device. A tensor that the model does not have keeps its name.
    """

    path: Path
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Yield a function from a tensor's name in the model to the tensor."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            yield lambda name: file.get_tensor(self.names[name])

    def without(self, name: str) -> StoredFile:
        """Return the file without a tensor."""
        return replace(self, tensors={key: tensor for key, tensor in self.tensors.items() if key != name})


def stored_files(source: Source, model: nn.Module) -> list[StoredFile]:
    """Return the weight files of a model. Reads their headers only.

    model: without weights, as built from the config. Raises UserError for a file that is missing or damaged, for dtypes
    that cannot be pruned, and for two tensors of one name.
    """
    causal: Any = model
    family = family_of(causal.config.model_type)
    known = model.state_dict().keys()
    wrapped = source.is_wrapped or has_wrapped_names(causal.config.model_type)
    prefix = f"{causal.base_model_prefix}."
    computed = f"{family.rotary.rpartition('.')[2]}.inv_freq"  # stored by old checkpoints, computed today

    def name_of(stored: str) -> str:
        name = decoder_name(stored) if wrapped else stored
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((each for each in candidates if family.file_piece(each).tensor in known), name)

    files: list[StoredFile] = []
    paths: dict[str, Path] = {}
    for path in source.weight_files():
        names, tensors = {}, {}
        for stored, tensor in stored_tensors(path).items():
            if stored.endswith(computed):
                continue
            name = name_of(stored)
            if (other := paths.setdefault(name, path)) != path or name in names:
                where = f" in {path.name}" if other == path else f", in {other.name} and in {path.name}"
                raise UserError(
                    f"{source.name}: holds the tensor {name} twice{where}. Remove the one that is not the model's."
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{path}: {stored} has the dtype {tensor.dtype}, which cannot be exported. "
                    f"Supported dtypes are {', '.join(DTYPES)}."
                )
            names[name] = stored
            tensors[name] = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        files.append(StoredFile(path, names, tensors))
    return _with_embedding(files, family) if causal.config.tie_word_embeddings else files


def refuse_incomplete(name: str, files: Sequence[StoredFile], model: PrunableModel) -> None:
    """Raise UserError unless the files of the model `name` hold the tensors of `model`, in their shapes."""
    by_name = {key: tensor.shape for file in files for key, tensor in file.tensors.items()}
    family, in_model = model.family, model.module.state_dict()
    pieces = {family.file_piece(key): shape for key, shape in by_name.items()}
    stored: dict[Place, torch.Size] = {(piece.tensor, piece.group, piece.part): pieces[piece] for piece in pieces}
    in_pieces = {piece.tensor for piece in pieces if piece.group is not None}
    parts = unit_tensors(model)
    for key, tensor in in_model.items():
        if key == family.head_weight and (key, None, None) not in stored and model.config.tie_word_embeddings:
            continue
        expected: dict[Place, torch.Size] = {(key, None, None): tensor.shape}
        if key in in_pieces:
            expected = {(key, *place): shape for place, shape in _piece_shapes(parts[key], tensor.shape)}
        for place, shape in expected.items():
            found = stored.get(place)
            if found is None and key == family.head_weight and not _unmerged(files):  # the last: all others are there
                raise UserError(
                    f"{name}: has no {key}. This is a model without a language-model head (an embedding model), and "
                    "pgprune needs one."
                )
            if found != shape:
                fault = f"is missing{_unmerged(files)}" if found is None else f"has the shape {tuple(found)}"
                raise UserError(
                    f"{name}: the tensor {_piece_name(*place)} {fault}. According to config.json, its shape is "
                    f"{tuple(shape)}."
                )


def _with_embedding(files: Sequence[StoredFile], family: ModelFamily) -> list[StoredFile]:
    """Return the files with the head for the embedding, if they hold only the head of two tied tensors."""
    head, embedding = family.head_weight, family.embedding_weight
    if any(embedding in file.tensors for file in files):
        return list(files)

    def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {embedding if name == head else name: value for name, value in entries.items()}

    return [replace(file, names=renamed(file.names), tensors=renamed(file.tensors)) for file in files]


def _unmerged(files: Sequence[StoredFile]) -> str:
    """Return a remark about an adapter among the weights, "" if there is none."""
    stored = next((name for file in files for name in file.names.values() if ".lora_" in name), None)
    return "" if stored is None else f", because an adapter is not merged into it ({stored})"


def _piece_shapes(tensor: UnitTensor, shape: torch.Size) -> Iterator[tuple[tuple[int, int], torch.Size]]:
    """Yield the shape of every matrix of every expert in a tensor that files hold in pieces, by (expert, part)."""
    for group in range(shape[0]):
        for number, part in enumerate(tensor.parts):
            sizes = list(shape[1:])
            sizes[tensor.axis - 1] = part.rows
            yield (group, number), torch.Size(sizes)


def _piece_name(tensor: str, group: int | None, part: int | None) -> str:
    return tensor if group is None else f"of part {part} of expert {group} of {tensor}"
