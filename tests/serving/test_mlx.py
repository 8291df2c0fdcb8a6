"""Pruned models in the real mlx-lm generate what transformers generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.masks import draw
from helpers.models import ARCHITECTURES, tiny_config, tiny_model
from helpers.runtimes import SIZES, greedy, prompts, write_pruned
from transformers import AutoModelForCausalLM

from pgprune_cli.export import mlx
from pgprune_cli.export.plan import Options
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

pytestmark = [pytest.mark.serving, pytest.mark.filterwarnings("default")]
mx = pytest.importorskip(
    "mlx.core", reason="MLX is not installed: make test-serving, or pgprune[mlx]", exc_type=ImportError
)
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: make test-serving, or pgprune[mlx]")
COUNT = 20
SERVED = [architecture for architecture in ARCHITECTURES if tiny_config(architecture).model_type in mlx.FAMILIES]


@pytest.fixture(autouse=True)
def on_the_cpu():
    """MLX computes in float32 throughout only on the CPU."""
    mx.set_default_device(mx.cpu)


def assert_mlx_agrees(model, directory: Path) -> None:
    """Fail unless mlx-lm, with its cache, gives the greedy tokens and log-probabilities of transformers."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    loaded, _ = load_model(directory, trust_remote_code=True)
    for prompt in prompts():
        tokens, logprobs = greedy(model, prompt, COUNT)
        steps = [(int(token), row) for token, row in generate_step(mx.array(prompt), loaded, max_tokens=COUNT)]
        assert [token for token, _ in steps] == tokens
        assert [float(row[token]) for token, row in steps] == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("biases", [(), ("attention", "mlp")], ids=["", "output biases"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("architecture", SERVED)
def test_mlx_agrees_with_transformers_on_layers_of_any_size(architecture, name, biases, tmp_path):
    model = write_pruned(architecture, SIZES[name], tmp_path, biases)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_file": mlx.MODEL_FILE.name}))
    shutil.copy(mlx.MODEL_FILE, tmp_path)
    assert_mlx_agrees(model, tmp_path)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("architecture", SERVED)
def test_mlx_agrees_with_transformers_on_an_export_with_its_own_rope(architecture, uniform, tmp_path):
    """If all layers are alike, transformers loads the export as a stock model."""
    dense = tiny_model(architecture)
    dense.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    dense.save_pretrained(tmp_path / "base")
    source = resolve(str(tmp_path / "base"))
    sizes = [((2, 1), 16)] * 4 if uniform else [(0, 16), ((1, 1), 16), (2, 16), ((3, 1), 16)]
    decision = Decision(draw(dense, sizes), source.name, source.fingerprint(), 0.5, "dtype: float32", 10, 80, 9, 2.5)
    mlx.plan(source, decision, Options()).write(tmp_path / "out", lambda _: None)
    assert_mlx_agrees(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tmp_path / "out")
