"""Measure the perplexity of GGUF files in llama.cpp, in the windows of `pgprune eval`.

    python scripts/bench/gguf_perplexity.py FILE.gguf… --base MODEL --text FILE [--windows 256] [--bos]

Needs llama-cpp-python (`pip install 'pgprune[k-quants]'`). The tokens come from the base model's tokenizer. With
`--bos`, each window begins with that token in place of its last one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import spread
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import resolve


def windows_of(base: str, text: str, count: int, seqlen: int, bos: bool) -> Tensor:
    """Return windows `(count, seqlen)` int64, spread over the text."""
    tokenizer = load_tokenizer(resolve(base))
    tokens = tokens_of(text, "evaluation", tokenizer)
    windows = spread(tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen), count)
    if bos:
        windows = torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id), windows[:, :-1]], 1)
    return windows


def perplexity(path: Path, windows: Tensor, threads: int) -> float:
    """Return exp of the mean loss of a file over all predictions in the windows `(N, seqlen)`."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=windows.shape[1], logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
    )
    nats = 0.0
    for window in windows.tolist():
        model.reset()
        model.eval(window)
        scores = torch.from_numpy(np.array(model.scores[: len(window) - 1]))
        nats += float(torch.nn.functional.cross_entropy(scores, torch.tensor(window[1:]), reduction="sum"))
    return math.exp(nats / (windows.numel() - len(windows)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--bos", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    windows = windows_of(options.base, options.text, options.windows, options.seqlen, options.bos)
    for path in options.files:
        ppl = perplexity(path, windows, options.threads)
        print(json.dumps({"file": path.name, "bytes": path.stat().st_size, "ppl": round(ppl, 4)}), flush=True)


if __name__ == "__main__":
    main()
