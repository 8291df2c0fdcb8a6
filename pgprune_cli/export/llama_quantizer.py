"""Runs llama.cpp's quantizer. This file is started as a process of its own, because llama.cpp ends it on some errors.

Arguments: the full-precision GGUF file, the file to write, and llama.cpp's number of the quantization.
"""

from __future__ import annotations

import ctypes
import os
import sys


def main(source: str, out: str, kind: str) -> int:
    """Quantize a file. Return 0 on success."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(kind)
    failed: int = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
