"""Export to one GGUF file for llama.cpp and what is built on it: weights, tokenizer, chat template.

The decision is replayed on the base's weights, a tensor at a time. `gguf_layout.py` says what the file looks like,
`gguf_types.py` how values are stored, `gguf_tokenizer.py` how the tokenizer gets in.
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
from pgprune_cli.export import gguf_checksum as gguf_checksum
from pgprune_cli.export import gguf_types
from pgprune_cli.export.dense_model import Base
from pgprune_cli.export.gguf_layout import NEEDS, Layout
from pgprune_cli.export.gguf_tokenizer import add_tokenizer
from pgprune_cli.export.plan import SLACK, Measured, Options, Plan, check_new, check_space, operate
from pgprune_cli.export.surgery import Cut
from pgprune_cli.model.source import Source
from pgprune_cli.run.decision import Decision
from pgprune_cli.storage.atomic import new_file

DTYPES = tuple(gguf_types.TYPES)
"""What the matrices can be stored as."""

ALIGNMENT = 32
"""Tensors begin at multiples of this many bytes: the format's default."""


@dataclass(frozen=True)
class FilePlan(Plan):
    """architecture: llama.cpp's; dtype: of the matrices, one of DTYPES; header: the file up to its first tensor."""

    architecture: str
    dtype: str
    header: bytes

    @property
    def model_type(self) -> str:
        return self.architecture

    @property
    def stock(self) -> bool:
        return self.architecture != "deci"

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(_aligned(self.stored(cut)[1]) for cut in self.cuts)

    def stored(self, cut: Cut) -> tuple[str, int]:
        dtype = gguf_types.stored_as(cut.shape, self.dtype)
        return dtype, gguf_types.bytes_of(cut.shape, dtype)

    def write(self, out: Path, on_bytes: Callable[[int], None]) -> None:
        out = out.expanduser().resolve()
        check_new(out, directory=False)
        check_space(out, self.bytes + SLACK)
        with new_file(out) as temporary:
            with temporary.open("wb") as file:
                file.write(self.header)
                for cut, tensor in zip(self.cuts, self.tensors(self.cuts, on_bytes), strict=True):
                    dtype, size = self.stored(cut)
                    for piece in gguf_types.encoded(tensor, dtype):
                        file.write(piece)
                    file.write(bytes(_aligned(size) - size))
            gguf_checksum.write_checksum(temporary)


def plan(source: Source, decision: Decision, options: Options, measured: Measured | None = None) -> FilePlan:
    """The plan of a GGUF file; reads no weights, but the tokenizer.

    Raises UserError as `operate` does, and where GGUF has no place for the architecture or the tokenizer.
    """
    gguf = _library()
    base, surgery = operate(source, decision, options.needs.and_of(NEEDS))
    layout = Layout.of(base.config, surgery)
    dtype = options.dtype or _dtype_of(base)
    cuts = [_typed(placed, dtype) for cut in surgery.cuts() for placed in layout.place(cut)]
    writer = gguf.GGUFWriter(None, layout.architecture)
    _add_general(writer, decision, dtype, measured)
    _add_sizes(writer, layout, base.config)
    add_tokenizer(writer, source, base.config.vocab_size)
    header = _header(writer, cuts, dtype)
    return FilePlan(base, decision, surgery, {"": cuts}, measured, layout.architecture, dtype, header)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the extra: pip install 'pgprune[gguf]'") from None
    return gguf


def _dtype_of(base: Base) -> str:
    """The base's own, as its first matrix has it; float32 where it is one that GGUF does not store."""
    first = next(tensor for tensor in base.tensors.values() if tensor.dim() == 2)
    dtype = str(first.dtype).removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def _typed(cut: Cut, dtype: str) -> Cut:
    """With the dtype that it is stored as; what is to be quantised stays as it is."""
    stored = gguf_types.stored_as(cut.shape, dtype)
    return cut if stored == "q8_0" else dataclasses.replace(cut, dtype=getattr(torch, stored))


def _add_general(writer: Any, decision: Decision, dtype: str, measured: Measured | None) -> None:
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
    writer.add_array("pgprune.kept.kv_heads", [int(layer.attention.sum()) for layer in decision.model_mask])
    writer.add_array("pgprune.kept.ffn_channels", [int(layer.ffn.sum()) for layer in decision.model_mask])
    if measured:
        writer.add_string("pgprune.evaluation", json.dumps(measured))


def _add_sizes(writer: Any, layout: Layout, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(layout.context)
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(layout.sizes))
    heads, groups, channels = layout.heads, layout.groups, layout.channels
    alike = layout.architecture != "deci"
    writer.add_head_count(heads[0] if alike else heads)
    writer.add_head_count_kv(groups[0] if alike else groups)
    writer.add_feed_forward_length(channels[0] if alike else channels)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if layout.rope[1] != 1.0:
        writer.add_rope_scaling_attn_factors(layout.rope[1])


def _header(writer: Any, cuts: list[Cut], dtype: str) -> bytes:
    """What the library makes of the metadata and of the names, sizes and places of the tensors."""
    for cut in cuts:
        stored = gguf_types.stored_as(cut.shape, dtype)
        size = gguf_types.bytes_of(cut.shape, stored)
        writer.add_tensor_info(cut.name, tuple(cut.shape), np.dtype(np.float32), size, gguf_types.type_of(stored))
    with TemporaryDirectory() as folder, closing(writer):
        writer.write_header_to_file(Path(folder) / "header")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = (Path(folder) / "header").read_bytes()
    return header + bytes(_aligned(len(header)) - len(header))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
