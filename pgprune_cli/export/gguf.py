"""Export to one GGUF file, for llama.cpp and everything built on it: weights, tokenizer, chat template.

The decision is replayed on the base model's weights, one tensor at a time. `gguf_layout.py` decides the layout of the
file, `gguf_types.py` how values are stored, and `gguf_tokenizer.py` converts the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pgprune_cli import __version__
from pgprune_cli.errors import UserError
from pgprune_cli.export import gguf_checksum, gguf_types
from pgprune_cli.export.dense_model import DenseModel
from pgprune_cli.export.gguf_layout import REQUIREMENTS, Layout
from pgprune_cli.export.gguf_tokenizer import add_tokenizer
from pgprune_cli.export.plan import DISK_RESERVE, Measured, Options, Plan, check_new, check_space, prepare
from pgprune_cli.export.surgery import TensorEdit
from pgprune_cli.model.gguf_header import ALIGNMENT
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision
from pgprune_cli.storage.atomic import new_file

DTYPES = tuple(gguf_types.TYPES)
"""The dtypes that matrices can be stored in."""


@dataclass(frozen=True)
class FilePlan(Plan):
    """The plan of a GGUF file.

    architecture: llama.cpp's; dtype: of the matrices, one of DTYPES; header: the file up to its first tensor.
    """

    architecture: str
    dtype: str
    header: bytes

    @property
    def model_type(self) -> str:
        return self.architecture

    @property
    def stock(self) -> bool:
        return self.architecture == self.surgery.family.gguf[self.base.config.model_type].equal

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(_aligned(self.stored(edit)[1]) for edit in self.edits)

    def stored(self, edit: TensorEdit) -> tuple[str, int]:
        dtype = gguf_types.stored_dtype(edit.shape, self.dtype)
        return dtype, gguf_types.bytes_of(edit.shape, dtype)

    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        out = out.expanduser().resolve()
        check_new(out, directory=False)
        check_space(out, self.bytes + DISK_RESERVE)
        with new_file(out) as temporary:
            with temporary.open("wb") as file:
                file.write(self.header)
                for edit, tensor in zip(self.edits, self.tensors(self.edits, on_bytes), strict=True):
                    dtype, size = self.stored(edit)
                    for piece in gguf_types.encoded(tensor, dtype):
                        file.write(piece)
                    file.write(bytes(_aligned(size) - size))
            gguf_checksum.write_checksum(temporary)


def plan(source: Source, decision: Decision, options: Options, measured: Measured | None = None) -> FilePlan:
    """Return the plan of a GGUF file. Reads the tokenizer, but no weights.

    Raises UserError as `prepare` does, and if GGUF cannot hold the architecture or the tokenizer.
    """
    gguf = _import_gguf()
    base, surgery = prepare(source, decision, options.requirements.combined(REQUIREMENTS))
    layout = Layout.of(base.config, surgery)
    dtype = options.dtype or _default_dtype(base)
    edits = [_with_stored_dtype(placed, dtype) for edit in surgery.edits() for placed in layout.place(edit)]
    writer = gguf.GGUFWriter(None, layout.architecture)
    _add_general(writer, decision, layout, dtype, measured)
    _add_sizes(writer, layout, base.config)
    add_tokenizer(writer, source, base.config.vocab_size)
    header = _header(writer, edits, dtype)
    return FilePlan(base, decision, surgery, {"": edits}, measured, layout.architecture, dtype, header)


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


def _add_general(writer: Any, decision: Decision, layout: Layout, dtype: str, measured: Measured | None) -> None:
    import gguf

    kind = gguf_types.TYPES[dtype]
    model = Path(decision.model).name
    writer.add_type("model")
    writer.add_name(f"{model}, pruned")
    writer.add_description(f"{model} without {decision.sparsity:.1%} of its prunable parameters (pgprune)")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(gguf_checksum.KEY, gguf_checksum.EMPTY)
    writer.add_string("pgprune.version", __version__)
    writer.add_string("pgprune.recipe", decision.recipe)
    for block in layout.family.blocks:
        key = block.element_name.lower().replace(" ", "_")  # query_heads, ffn_channels
        writer.add_array(f"pgprune.kept.{key}", [int(layer.of(block.name).sum()) for layer in decision.model_mask])
    if measured:
        writer.add_string("pgprune.evaluation", json.dumps(measured))


def _add_sizes(writer: Any, layout: Layout, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(layout.context)
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(layout.kept))
    heads, kv_heads, channels = layout.heads, layout.kv_heads, layout.channels
    per_layer = layout.architecture == layout.family.gguf[config.model_type].unequal
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(kv_heads if per_layer else kv_heads[0])
    writer.add_feed_forward_length(channels if per_layer else channels[0])
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if layout.rope.scale != 1.0:
        writer.add_rope_scaling_attn_factors(layout.rope.scale)


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
