"""Quantizes a GGUF file with llama.cpp's own quantizer: k-quants, whose blocks share scales among 256 weights.

The quantizer chooses a type for each tensor. A matrix whose rows are no multiple of 256 weights gets a larger type with
blocks of 32. Needs llama-cpp-python, which brings the quantizer as a library.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.export import gguf_types, llama_quantizer

K_QUANTS = {
    "q2_k": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
}
"""The quantizations that need no calibration data, and the type that most of their matrices get."""

FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What llama.cpp uses for a matrix whose rows the blocks of a type do not divide."""

EMBEDDINGS = ("token_embd.weight", "output.weight")
POLL_SECONDS = 0.1


def require(dtype: str) -> None:
    """Raise UserError if llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"--dtype {dtype}: needs llama.cpp's quantizer. Install it with: pip install 'pgprune[k-quants]'"
        )


def is_quantized(name: str, shape: torch.Size) -> bool:
    """Return True if llama.cpp quantizes the tensor of this GGUF name: a matrix, but no norm and no router."""
    return len(shape) > 1 and name.endswith(".weight") and "_norm." not in name and "ffn_gate_inp" not in name


def expected_type(name: str, shape: torch.Size, dtype: str) -> str:
    """Return the name of the type that llama.cpp probably gives to a matrix.

    It gives some matrices of the `_m` and `_l` quantizations a larger type, so sizes made from this are estimates.
    """
    kind = "q6_k" if name in EMBEDDINGS else K_QUANTS[dtype]
    if not falls_back(shape):
        return kind
    return FALLBACKS[kind] if shape[-1] % 32 == 0 else "float16"


def falls_back(shape: torch.Size) -> bool:
    """Return True if the rows of a matrix are no multiple of 256 weights, the block size of k-quants."""
    return shape[-1] % 256 != 0


def notes(shapes: Mapping[str, torch.Size]) -> list[str]:
    """Return what to say about the matrices that fall back. shapes: of the quantized tensors, by name."""
    names = [name for name, shape in shapes.items() if falls_back(shape)]
    if not names:
        return []
    note = (
        f"{len(names)} of {len(shapes)} matrices have rows that are no multiple of 256 weights, so llama.cpp stores "
        "them in larger types than the dtype says."
    )
    if paddable := sum(".ffn_down" in name for name in names):
        note += f" For {paddable} of them, budget.ffn_multiple: 256 in the recipe or --pad-ffn 256 avoids it."
    return [note]


def quantize(source: Path, out: Path, dtype: str, on_bytes: Callable[[int], None]) -> None:
    """Write `source`, a float GGUF file, to `out` as `dtype`. `on_bytes(n)` is called while `out` grows by n bytes.

    Raises RunError if llama.cpp cannot quantize the file.
    """
    # -P: the directory of the script has a module called gguf, which must not hide the library
    command = [sys.executable, "-P", llama_quantizer.__file__, str(source), str(out), str(int(file_type(dtype)))]
    with TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            written = 0
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                size = out.stat().st_size
                on_bytes(max(size - written, 0))
                written = max(size, written)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
            raise RunError(
                f"--dtype {dtype}: llama.cpp could not quantize the model (exit code {process.returncode}: "
                f"{lines[-1].strip()}). Export it with --dtype q8_0."
            )


def file_type(dtype: str) -> Any:
    """Return llama.cpp's number of a dtype of matrices or a quantization."""
    import gguf

    kind = gguf_types.TYPES.get(dtype, dtype.upper())
    return gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
