"""Runs GGUF files in the real llama.cpp, in a separate process, because a bad file may crash it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds, and the llama.cpp process does not need it
    from torch import Tensor

Prompt = list[int] | str


def require() -> None:
    """Skip the calling test if llama.cpp is not installed."""
    import pytest

    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("no llama.cpp: pip install 'pgprune[serving-tests]'")


def generate(
    models: list[Path], prompt: Prompt, tokens: int, vocabulary: int, forced: int | None = None
) -> list[tuple[list[int], Tensor]]:
    """Return, for each file, the greedy continuation of a prompt: token ids, and log-probabilities `(tokens, V)`.

    Tokens that end the text are never generated. forced: generate this token whatever its probability, because
    llama.cpp returns no probabilities if the text ends within a character.
    """
    import torch

    task = {"models": [str(model) for model in models], "prompt": prompt, "tokens": tokens, "vocabulary": vocabulary}
    task["bias"] = [] if forced is None else [[forced, 1000.0]]
    process = subprocess.run([sys.executable, __file__], input=json.dumps(task), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    results = json.loads(process.stdout.splitlines()[-1])
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
        # flash attention on the CPU computes in float16
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(parameters)
        options = {"n_predict": task["tokens"], "n_probs": task["vocabulary"], "temperature": 0, "ignore_eos": True}
        options["logit_bias"] = task["bias"]
        answer = server.handle_completions({"prompt": task["prompt"], **options})
        steps = answer["choices"][0]["logprobs"]["content"]
        rows = [{entry["id"]: entry["logprob"] for entry in step["top_logprobs"]} for step in steps]
        ids = [step["id"] for step in steps]
        results.append((ids, [[row[index] for index in range(task["vocabulary"])] for row in rows]))
    return results


if __name__ == "__main__":
    print(json.dumps(_run(json.load(sys.stdin))))
