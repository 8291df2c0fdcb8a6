"""Where the tensors of an export go in a GGUF file: named, split or merged, reordered, multiplied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.gguf_architectures import Architecture
from pgprune_cli.export.gguf_layout import Layout, number_of
from pgprune_cli.export.surgery import TensorEdit


@dataclass(frozen=True)
class Placement:
    """Turns the edits of an export, with transformers' names, into those of a file with this layout."""

    layout: Layout

    @property
    def architecture(self) -> Architecture:
        return self.layout.architecture

    def place(self, edits: list[TensorEdit]) -> list[TensorEdit]:
        """Return the tensors of the file, in its order. Raises UserError for one that the architecture cannot store."""
        split = [self._finished(part) for edit in edits for part in self._split(edit)]
        placed = list(self._merged(split))
        placed += self._extra(edits, {edit.name for edit in placed})
        known = self._known_names()
        for edit in placed:
            if parts_of(edit.name)[1] not in known:
                raise self._error(edit.name)
        return placed

    def _split(self, edit: TensorEdit) -> Iterator[TensorEdit]:
        """Yield the edit with its name in the file. Fused projections are split unless the file fuses them too."""
        name = self.layout.names.get_name(edit.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise self._error(edit.name)
        layer, base, kind = parts_of(name)
        sizes = self._fused_sizes(base, layer, edit.shape[0])
        if base in self.architecture.fused or not sizes:
            yield dataclasses.replace(edit, name=name)
            return
        begin = 0
        for part, size in sizes.items():
            make = _rows(edit.make, begin, begin + size)
            shape = torch.Size((size, *edit.shape[1:]))
            yield dataclasses.replace(edit, name=f"blk.{layer}.{part}.{kind}", shape=shape, make=make)
            begin += size

    def _fused_sizes(self, base: str, layer: int, rows: int) -> dict[str, int]:
        """Return the names and rows of the projections in a tensor, nothing if it holds only one."""
        layout = self.layout
        if base == "attn_qkv":
            queries, keys = layout.heads[layer] * layout.head_dim, layout.kv_heads[layer] * layout.head_dim
            return {"attn_q": queries, "attn_k": keys, "attn_v": keys}
        if base == "ffn_up" and rows == 2 * layout.channels[layer]:
            return {"ffn_gate": rows // 2, "ffn_up": rows // 2}
        return {}

    def _finished(self, edit: TensorEdit) -> TensorEdit:
        """Return the edit with its rows in the file's order, and multiplied with what the graph lacks."""
        layer, base, _ = parts_of(edit.name)
        make = edit.make
        heads = {"attn_q": self.layout.heads, "attn_k": self.layout.kv_heads}
        if self.architecture.paired and base in heads:
            make = self.layout.rope.in_pairs(make, heads[base][layer])
        shift = self.architecture.norm_shift if base.endswith("norm") else 0.0
        factor = self.layout.factors.get(base, 1.0)
        if shift or factor != 1.0:
            make = _linear(make, shift, factor)
        return dataclasses.replace(edit, make=make)

    def _merged(self, edits: list[TensorEdit]) -> Iterator[TensorEdit]:
        """Yield the edits, with those of queries, keys and values merged if the file fuses them."""
        by_name = {edit.name: edit for edit in edits}
        for edit in edits:
            layer, base, kind = parts_of(edit.name)
            if "attn_qkv" not in self.architecture.fused or base not in ("attn_q", "attn_k", "attn_v"):
                yield edit
            elif base == "attn_q":
                rows = tuple(by_name[f"blk.{layer}.attn_{part}.{kind}"] for part in "qkv")
                shape = torch.Size((sum(each.shape[0] for each in rows), *edit.shape[1:]))
                yield dataclasses.replace(edit, name=f"blk.{layer}.attn_qkv.{kind}", shape=shape, rows=rows)

    def _extra(self, edits: list[TensorEdit], present: set[str]) -> Iterator[TensorEdit]:
        """Yield the tensors that only the file has: factors of RoPE, and an output matrix of its own."""
        norm = next(edit for edit in edits if edit.name == f"{self.layout.family.final_norm}.weight")
        for name, values in self.layout.rope.tensors.items():
            # The values come from the config, but every edit reads some tensor, and the final norm is a small one.
            yield TensorEdit(name, values.shape, values.dtype, norm.source, _constant(values))
        multiplied = {"token_embd", "output"} & self.layout.factors.keys()
        if "output.weight" not in present and (self.architecture.head == "own" or multiplied):
            embedding = next(edit for edit in edits if edit.name == self.layout.family.embedding_weight)
            yield self._finished(dataclasses.replace(embedding, name="output.weight"))

    def _known_names(self) -> set[str]:
        """Return the tensors that the architecture has a place for, without their layer and suffix."""
        import gguf

        tensors = gguf.MODEL_TENSORS[number_of(self.architecture.name)]
        names = {gguf.TENSOR_NAMES[tensor].replace("blk.{bid}.", "") for tensor in tensors}
        return names | ({"rope_factors_long", "rope_factors_short"} if self.architecture.rope_by_length else set())

    def _error(self, name: str) -> UserError:
        return UserError(
            f"--format gguf: the {self.architecture.name} architecture cannot store the tensor {name}. "
            "Export the model with --format hf."
        )


def parts_of(name: str) -> tuple[int, str, str]:
    """Return the layer (-1 if there is none), the name inside it and the suffix of a GGUF tensor."""
    path, _, kind = name.rpartition(".")
    if not path.startswith("blk."):
        return -1, path, kind
    _, layer, base = path.split(".", 2)
    return int(layer), base, kind


def _rows(make: Callable[[Tensor], Tensor], begin: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: make(tensor)[begin:end]


def _linear(make: Callable[[Tensor], Tensor], shift: float, factor: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (make(tensor).float() + shift) * factor


def _constant(values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: values
