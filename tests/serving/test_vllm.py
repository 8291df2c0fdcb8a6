"""Pruned models in the real vLLM, without trust_remote_code, generate what transformers generates."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers.masks import keep_first
from helpers.models import ARCHITECTURES, tiny_config, tiny_model
from helpers.runtimes import SIZES, greedy, prompts, write_pruned
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pgprune_cli.export import hf
from pgprune_cli.export.plan import Options
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision
from pgprune_cli.serving.vllm_plugin import FAMILIES

pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-serving, or pgprune[vllm]"
    ),
]
COUNT = 20
POLL_INTERVAL = 1.0
"""Seconds between two attempts to reach the server while it starts."""
KEPT = [(0, 9), (3, 24), (0, 0), (2, 0)]  # KV heads and FFN channels of every layer
SERVED = [architecture for architecture in ARCHITECTURES if tiny_config(architecture).model_type in FAMILIES]
CASES = {f"{name}, {architecture}": (architecture, name, ()) for architecture in SERVED for name in SIZES} | {
    f"output biases, {architecture}": (architecture, "no heads, no channels", ("attention", "mlp"))
    for architecture in ("llama-gqa", "mistral", "qwen2", "qwen3")
}
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """What transformers and what vLLM append to every prompt, by case. One vLLM process runs all cases."""
    expected, tasks = {}, []
    for case, (architecture, name, biases) in CASES.items():
        directory = tmp_path_factory.mktemp("model")
        model = write_pruned(architecture, SIZES[name], directory, biases)
        expected[case] = [greedy(model, prompt, COUNT) for prompt in prompts()]
        tasks.append((str(directory), prompts(), COUNT))
    out = tmp_path_factory.mktemp("vllm") / "tokens.json"
    script = Path(__file__).parents[1] / "helpers" / "vllm_greedy.py"
    done = subprocess.run(
        [sys.executable, script, out], input=json.dumps(tasks), text=True, capture_output=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return expected, dict(zip(CASES, json.loads(out.read_text()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_vllm_gives_the_greedy_tokens_and_probabilities_of_transformers(generated, case):
    expected, actual = generated
    for (tokens, logprobs), (vllm_tokens, vllm_logprobs) in zip(expected[case], actual[case], strict=True):
        assert vllm_tokens == tokens
        assert vllm_logprobs == pytest.approx(logprobs, abs=1e-3)


@pytest.fixture
def base(tmp_path):
    """A random Llama with the demo's tokenizer. The demo's own heads are too small for vLLM's attention on a CPU."""
    demo = resolve("demo").directory
    sizes = tiny_config("llama-gqa").to_dict() | {"head_dim": 32}
    config = LlamaConfig(**sizes | {"vocab_size": AutoConfig.from_pretrained(demo).vocab_size})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "base")
    for path in demo.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "base")
    return resolve(str(tmp_path / "base"))


def test_the_openai_server_serves_an_export(base, tmp_path):
    decision = Decision(
        keep_first(tiny_model("llama-gqa"), KEPT), base.name, base.fingerprint(), 0.5, "dtype: float32", 10, 80, 9, 2.5
    )
    hf.plan(base, decision, Options()).write(tmp_path / "out", lambda _: None)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the")["input_ids"]
    expected, _ = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids, COUNT)

    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "out"), "--port", "8765"]
    command += ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--served-model-name", "pruned"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        request = {"model": "pruned", "prompt": ids, "max_tokens": COUNT, "temperature": 0}
        answer = _ask(server, "http://127.0.0.1:8765/v1/completions", request | {"ignore_eos": True}, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(60)
    assert answer["choices"][0]["token_ids"] == expected


def _ask(server: subprocess.Popen, url: str, request: dict, log: Path) -> dict:
    """Post a request as soon as the server is up, and return its answer. The test's time limit ends the waiting."""
    body = json.dumps(request | {"return_token_ids": True}).encode()
    post = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(post, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(POLL_INTERVAL)
