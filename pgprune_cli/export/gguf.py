"""Export to one GGUF file, for llama.cpp and everything built on it: weights, tokenizer, chat template.

The decision is replayed on the base model's weights, one tensor at a time. `gguf_layout.py` decides the layout of the
file, `gguf_tensors.py` where tensors go, `gguf_types.py` how values are stored; `gguf_tokenizer.py` converts the
tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pgprune_cli import __version__
from pgprune_cli.errors import UserError
from pgprune_cli.export import gguf_checksum, gguf_quantize, gguf_types
from pgprune_cli.export.dense_model import DenseModel
from pgprune_cli.export.gguf_architectures import ARCHITECTURES
from pgprune_cli.export.gguf_layout import Layout, requirements_of
from pgprune_cli.export.gguf_tensors import Placement
from pgprune_cli.export.gguf_tokenizer import add_tokenizer
from pgprune_cli.export.plan import DISK_RESERVE, Again, Measured, Options, Plan, check_new, check_space, prepare
from pgprune_cli.export.surgery import TensorEdit
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import dense_type
from pgprune_cli.model.gguf_header import ALIGNMENT
from pgprune_cli.model.loading import read_config
from pgprune_cli.model.names import short_name
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision
from pgprune_cli.storage.atomic import new_file, scratch_file
from pgprune_cli.storage.paths import expanded

DTYPES = (*gguf_types.TYPES, *gguf_quantize.K_QUANTS)
"""The dtypes that matrices can be stored in. llama.cpp makes the k-quants."""


@dataclass(frozen=True)
class FilePlan(Plan):
    """The plan of a GGUF file.

    architecture: llama.cpp's; dtype: of the matrices, one of DTYPES; full_dtype: of the matrices as pgprune writes
    them, which is another one for k-quants; header: the file up to its first tensor, with `full_dtype`; omitted: the
    tokens that the file leaves out.
    """

    architecture: str
    dtype: str
    full_dtype: str
    header: bytes
    omitted: Sequence[str]

    @property
    def model_type(self) -> str:
        return self.architecture

    @property
    def stock(self) -> bool:
        return not ARCHITECTURES[self.architecture].per_layer

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(_aligned(self.stored(edit)[1]) for edit in self.edits)

    @property
    def estimated(self) -> bool:
        return self.dtype in gguf_quantize.K_QUANTS

    @property
    def progress_bytes(self) -> int:
        return 2 * self.bytes if self.estimated else self.bytes  # k-quants: first the full precision, then the file

    @property
    def notes(self) -> list[str]:
        notes = gguf_quantize.notes(self._matrices()) if self.estimated else []
        if self.base.wrapper is not None:
            notes.append("The file holds the language model alone. llama.cpp reads the vision tower from another file.")
        if self.omitted:
            tokens = f"{len(self.omitted)} token{'s' if len(self.omitted) > 1 else ''}"
            notes.append(
                f"The file leaves out {tokens} for which the model has no embedding. The first is {self.omitted[0]}."
            )
        return notes

    def stored(self, edit: TensorEdit) -> tuple[str, int]:
        if not self.estimated or not gguf_quantize.is_quantized(edit.name, edit.shape):
            return self._full(edit)
        dtype = gguf_quantize.expected_type(edit.name, edit.shape, self.dtype)
        return dtype, gguf_types.bytes_of(edit.shape, dtype)

    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        out = expanded(out).resolve()
        check_new(out, directory=False)
        check_space(out, self.bytes + self.estimated * self._full_bytes() + DISK_RESERVE)
        with new_file(out) as temporary:
            if self.estimated:
                with scratch_file(out) as full:
                    self._write_full(full, on_bytes)
                    gguf_quantize.quantize(full, temporary, self.dtype, on_bytes)
            else:
                self._write_full(temporary, on_bytes)
            gguf_checksum.write_checksum(temporary)

    def _write_full(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Write the file with `full_dtype` and without its checksum."""
        with path.open("wb") as file:
            file.write(self.header)
            for edit, tensor in zip(self.edits, self.tensors(self.edits, on_bytes), strict=True):
                dtype, size = self._full(edit)
                for piece in gguf_types.encoded(tensor, dtype):
                    file.write(piece)
                file.write(bytes(_aligned(size) - size))

    def _full_bytes(self) -> int:
        return len(self.header) + sum(_aligned(self._full(edit)[1]) for edit in self.edits)

    def _full(self, edit: TensorEdit) -> tuple[str, int]:
        """Return the dtype and the size in bytes of a tensor as pgprune writes it."""
        dtype = gguf_types.stored_dtype(edit.shape, self.full_dtype)
        return dtype, gguf_types.bytes_of(edit.shape, dtype)

    def _matrices(self) -> dict[str, torch.Size]:
        """Return the shape of every tensor that llama.cpp quantizes, by name."""
        return {edit.name: edit.shape for edit in self.edits if gguf_quantize.is_quantized(edit.name, edit.shape)}


def plan(
    source: Source, decision: Decision, options: Options, measured: Measured | None = None, again: Again | None = None
) -> FilePlan:
    """Return the plan of a GGUF file. Reads the tokenizer, but no weights.

    Raises UserError as `prepare` does, and if GGUF cannot hold the architecture or the tokenizer.
    """
    gguf = _import_gguf()
    config = read_config(source)
    requirements = requirements_of(family_of(config.model_type), dense_type(config.model_type))
    requirements = options.requirements.combined(requirements)
    base, surgery = prepare(source, decision, requirements, again=again, decoder_only=True)
    layout = Layout.of(base.config, surgery)
    dtype = options.dtype or _default_dtype(base)
    full_dtype = dtype
    if dtype in gguf_quantize.K_QUANTS:
        gguf_quantize.require(dtype)
        full_dtype = _default_dtype(base)
    edits = [_with_stored_dtype(edit, full_dtype) for edit in Placement(layout).place(surgery.edits())]
    writer = gguf.GGUFWriter(None, layout.architecture.name)
    _add_general(writer, decision, layout, dtype, full_dtype, measured)
    if again is not None and again.recoveries:
        writer.add_string("pgprune.recovery", json.dumps(again.recoveries))
    layout.add(writer)
    omitted = add_tokenizer(writer, source, base.config.vocab_size)
    header = _header(writer, edits, full_dtype)
    architecture = layout.architecture.name
    return FilePlan(
        base, decision, surgery, {"": edits}, measured, again, architecture, dtype, full_dtype, header, omitted
    )


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("--format gguf: needs the gguf library. Install it with: pip install 'pgprune[gguf]'") from None
    return gguf


def _default_dtype(base: DenseModel) -> str:
    """Return the dtype of the base model's first matrix, or float32 if GGUF does not store that one."""
    matrix = next(tensor for tensor in base.tensors.values() if tensor.dim() == 2)
    dtype = str(matrix.dtype).removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def _with_stored_dtype(edit: TensorEdit, dtype: str) -> TensorEdit:
    """Return the edit with the dtype that its tensor is stored in. A tensor to quantise keeps the dtype that it has."""
    stored = gguf_types.stored_dtype(edit.shape, dtype)
    return edit if stored == "q8_0" else dataclasses.replace(edit, dtype=getattr(torch, stored))


def _add_general(
    writer: Any, decision: Decision, layout: Layout, dtype: str, full_dtype: str, measured: Measured | None
) -> None:
    """Add what the file says about itself. Its matrices have `full_dtype` until llama.cpp makes them `dtype`."""
    import gguf

    model = short_name(decision.model)
    writer.add_type("model")
    writer.add_name(f"{model}, pruned")
    writer.add_description(f"{model} without {decision.sparsity:.1%} of its prunable parameters (pgprune)")
    writer.add_file_type(gguf_quantize.file_type(full_dtype))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(gguf_checksum.KEY, gguf_checksum.EMPTY)
    writer.add_string(gguf_checksum.TENSORS_KEY, gguf_checksum.EMPTY)
    writer.add_uint32(gguf_checksum.TYPE_KEY, int(gguf_quantize.file_type(dtype)))
    writer.add_string("pgprune.version", __version__)
    writer.add_string("pgprune.recipe", decision.recipe)
    for block in layout.family.blocks:
        key = block.element_name.lower().replace(" ", "_")  # query_heads, ffn_channels
        writer.add_array(f"pgprune.kept.{key}", [int(layer.of(block.name).sum()) for layer in decision.model_mask])
    if measured:
        writer.add_string("pgprune.evaluation", json.dumps(measured))


def _header(writer: Any, edits: list[TensorEdit], dtype: str) -> bytes:
    """Return what the gguf library writes of the metadata and of the names, shapes and positions of the tensors."""
    for edit in edits:
        stored = gguf_types.stored_dtype(edit.shape, dtype)
        size = gguf_types.bytes_of(edit.shape, stored)
        writer.add_tensor_info(edit.name, tuple(edit.shape), np.dtype(np.float32), size, gguf_types.type_of(stored))
    with TemporaryDirectory() as folder, closing(writer):
        writer.write_header_to_file(Path(folder) / "header")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = (Path(folder) / "header").read_bytes()
    return header + bytes(_aligned(len(header)) - len(header))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
