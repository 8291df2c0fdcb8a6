"""Export to one GGUF file for llama.cpp and what is built on it: weights, tokenizer, chat template.

The decision is replayed on the base's weights tensor by tensor. `gguf_layout.py` says what the file looks like,
`gguf_tokenizer.py` how the tokenizer gets in. Types that need data or search (k-quants) are llama.cpp's own tool's to
make, from the file written here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli import __version__
from pgprune_cli.atomic import sync_directory
from pgprune_cli.decision import Decision
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.loading import Source
from pgprune_cli.writers.base import Base, open_base
from pgprune_cli.writers.gguf_layout import Layout
from pgprune_cli.writers.gguf_tokenizer import add_tokenizer
from pgprune_cli.writers.hf import SLACK, Written, check_base, check_space
from pgprune_cli.writers.surgery import Surgery

DTYPES = ("float32", "float16", "bfloat16", "q8_0")
"""What the matrices can be stored as. Norms and biases are float32, as llama.cpp wants them."""

PIECE = 1 << 24
"""Weights that are converted at a time."""


def write(
    source: Source,
    decision: Decision,
    out: Path,
    measured: Mapping[str, Any] | None,
    on_shard: Callable[[int, int], None],
    dtype: str | None = None,
) -> Written:
    """Writes the pruned model as the new file `out`; on any failure nothing of it is left.

    `measured` is the object of `pgprune eval`, which goes into the metadata. `on_shard(done, total)` follows every
    weight file of the base. `dtype` is one of DTYPES, or None for the base's.

    Raises:
        UserError: `out` exists or is not called `*.gguf`; the base is not the one that the decision was made for, or is
            quantised or incomplete; GGUF has no place for its architecture or its tokenizer; nothing is kept; the disk
            is too full.
    """
    gguf = _library()
    out = out.expanduser().resolve()
    if out.suffix != ".gguf":
        raise UserError(f"{out}: is one file, and its name should end in .gguf")
    if out.exists():
        raise UserError(f"{out}: exists already")
    check_base(source, decision)
    base = open_base(source, decision)
    found = {name: shape for shard in base.shards for name, shape in shard.shapes.items()}
    surgery = Surgery(base.shape.spec, decision.keep, decision.outputs)
    layout = Layout.of(base.shape.spec, base.config, surgery)
    cuts = surgery.cuts(found)
    entries = {name: layout.entry(cut.name, _cut_shape(cut, found[name])) for name, cut in cuts.items()}
    shards = [(shard, [name for name in shard.shapes if name in cuts]) for shard in base.shards]
    additions = layout.additions(surgery, found)
    wanted = dtype or _stored_dtype(base)

    writer = gguf.GGUFWriter(out, layout.architecture)
    _add_metadata(writer, layout, base, decision, out.stem, wanted, measured)
    add_tokenizer(writer, source, base.config.vocab_size)
    for entry in (entries[name] for _, names in shards for name in names):
        _announce(writer, entry.name, entry.shape, wanted)
    for name, tensor in additions.items():
        _announce(writer, name, tensor.shape, wanted)
    check_space(out, sum(info.nbytes for infos in writer.tensors for info in infos.values()) + SLACK)

    with _new_file(out) as temporary, closing(writer):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, (shard, names) in enumerate(shards, 1):
            with shard.open() as read:
                for name in names:
                    tensor = entries[name].make(cuts[name].apply(read(name)))
                    writer.write_tensor_data(_stored(tensor, _type(tensor.shape, wanted), name))
            on_shard(number, len(shards))
        for name, tensor in additions.items():
            writer.write_tensor_data(_stored(tensor, _type(tensor.shape, wanted), name))
    before = sum(shape.numel() for shape in found.values())
    after = sum(cut.numel(found[name]) for name, cut in cuts.items())
    stock = layout.architecture != "deci"
    layers = len(decision.keep), len(layout.sizes)
    return Written(out, layout.architecture, stock, *layers, before, after, out.stat().st_size)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the extra: pip install 'pgprune[gguf]'") from None
    return gguf


def _cut_shape(cut: Any, shape: torch.Size) -> torch.Size:
    if cut.mask is None:
        return shape
    sizes = list(shape)
    sizes[cut.axis] = sizes[cut.axis] // len(cut.mask) * int(cut.mask.sum())
    return torch.Size(sizes)


def _stored_dtype(base: Base) -> str:
    """The base's own, as its first matrix has it; float32 where it is one that GGUF does not store."""
    name, shard = next((name, s) for s in base.shards for name, shape in s.shapes.items() if len(shape) == 2)
    with shard.open() as read:
        dtype = str(read(name).dtype).removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def _add_metadata(
    writer: Any,
    layout: Layout,
    base: Base,
    decision: Decision,
    name: str,
    dtype: str,
    measured: Mapping[str, Any] | None,
) -> None:
    import gguf

    config = base.config
    file_types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(
        f"{Path(decision.model).name} without {decision.sparsity:.1%} of its prunable parameters (pgprune)"
    )
    writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(layout.context)
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(layout.sizes))
    heads = [layout.heads(layer) for layer in range(len(layout.sizes))]
    groups, channels = [size.groups for size in layout.sizes], [size.channels for size in layout.sizes]
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
    writer.add_string("pgprune.version", __version__)
    writer.add_string("pgprune.recipe", decision.recipe)
    writer.add_array("pgprune.kept.kv_groups", [int(layer.attention.sum()) for layer in decision.keep])
    writer.add_array("pgprune.kept.ffn_channels", [int(layer.ffn.sum()) for layer in decision.keep])
    if measured:
        writer.add_string("pgprune.evaluation", json.dumps(measured))


def _type(shape: torch.Size, dtype: str) -> Any:
    """How a tensor is stored. Rows that blocks of Q8_0 do not divide are stored as float16, as llama.cpp does."""
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    kind = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16, "q8_0": types.Q8_0}[dtype]
    return types.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _announce(writer: Any, name: str, shape: torch.Size, dtype: str) -> None:
    import gguf
    import numpy as np

    kind = _type(shape, dtype)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, tuple(shape), np.dtype(np.float32), shape.numel() // block * size, kind)


def _stored(tensor: Tensor, kind: Any, name: str) -> Any:
    """The values of a tensor as the file holds them, an array of bytes. Raises RunError where float16 overflows."""
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[kind]
    result = np.empty(tensor.numel() // block * size, dtype=np.uint8)
    rows = max(PIECE // tensor.shape[-1], 1)
    done = 0
    for piece in tensor.split(rows):
        values = piece.float().numpy()
        with np.errstate(over="ignore"):
            data = gguf.quants.quantize(values, kind)
        if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise RunError(f"{name}: holds values that float16 cannot; use --dtype bfloat16 or float32")
        data = data.reshape(-1).view(np.uint8)
        result[done : done + data.size] = data
        done += data.size
    return result


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """A name beside `out` whose file becomes `out`, synced, if the `with` ends well, and vanishes if it does not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync_directory(temporary)  # which does for files too
        temporary.rename(out)
        sync_directory(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
