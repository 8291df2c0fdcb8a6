"""GGUF files in the real llama.cpp, in a process of its own, which a file that it does not like may end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # seconds, which llama.cpp's own processes do without
    from torch import Tensor

Prompt = list[int] | str


def require() -> None:
    """Skips the test that asks, with the reason, where llama.cpp is not installed."""
    import pytest

    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("no llama.cpp: pip install 'pgprune[serving-tests]'")


def generate(
    models: list[Path], prompt: Prompt, tokens: int, vocabulary: int, forced: int | None = None
) -> list[tuple[list[int], Tensor]]:
    """With each file what follows the prompt, greedily and never ending: ids, and log-probabilities `(tokens, V)`.

    `forced` is generated whatever is likely: llama.cpp tells no probabilities where text ends within a character.
    """
    import torch

    task = {"models": [str(model) for model in models], "prompt": prompt, "tokens": tokens, "vocabulary": vocabulary}
    task["bias"] = [] if forced is None else [[forced, 1000.0]]
    ended = subprocess.run([sys.executable, __file__], input=json.dumps(task), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = json.loads(ended.stdout.splitlines()[-1])
    assert len(results) == len(models)
    return [(ids, torch.tensor(rows)) for ids, rows in results]


def _run(task: dict) -> list[tuple[list[int], list[list[float]]]]:
    import xllamacpp

    results = []
    for model in task["models"]:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = model
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 1, 0
        parameters.warmup = False
        # CPU flash attention computes in float16
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(parameters)
        wanted = {"n_predict": task["tokens"], "n_probs": task["vocabulary"], "temperature": 0, "ignore_eos": True}
        wanted["logit_bias"] = task["bias"]
        answer = server.handle_completions({"prompt": task["prompt"], **wanted})
        steps = answer["choices"][0]["logprobs"]["content"]
        rows = [{entry["id"]: entry["logprob"] for entry in step["top_logprobs"]} for step in steps]
        ids = [step["id"] for step in steps]
        results.append((ids, [[row[index] for index in range(task["vocabulary"])] for row in rows]))
    return results


if __name__ == "__main__":
    print(json.dumps(_run(json.load(sys.stdin))))
