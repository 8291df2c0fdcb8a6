"""What transformers does not read from GGUF is added to the config, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import decide
from helpers.masks import dense_mask
from helpers.messages import refused
from helpers.models import VOCABULARY, save_tokenizer, tiny_config
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from pgprune_cli.export import gguf
from pgprune_cli.export.plan import Options
from pgprune_cli.model.gguf_config import complete
from pgprune_cli.model.gguf_header import Header
from pgprune_cli.model.loading import check_prunable, load_model, read_config
from pgprune_cli.model.source import resolve

pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

THETA = 500000.0
LLAMA3 = {"rope_type": "llama3", "rope_theta": THETA, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": THETA, "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
GLOBAL = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}


def saved(directory: Path, architecture: str, **changes: Any) -> tuple[Any, Path]:
    """Return a tiny model, and the GGUF file that it is exported to."""
    config = tiny_config(architecture)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(directory / "base")
    save_tokenizer(directory / "base")
    decision = decide(directory / "base", dense_mask(model))
    gguf.plan(resolve(decision.model), decision, Options()).write(directory / "model.gguf", lambda _: None)
    return model, directory / "model.gguf"


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(100).reshape(2, 50) % VOCABULARY
    result: torch.Tensor = model(input_ids=tokens).logits
    return result


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("llama-mha", LLAMA3 | {"factor": 8.0}),
        ("llama-mha", LLAMA3 | {"factor": 32.0}),
        ("llama-gqa", {"rope_type": "default", "rope_theta": THETA}),
    ],
)
def test_the_scaling_of_llama_3_is_read(architecture: str, rope: dict[str, Any], tmp_path: Path) -> None:
    model, path = saved(tmp_path, architecture, rope_parameters=rope)
    source = resolve(str(path))
    check_prunable(source)
    assert read_config(source).rope_parameters == rope
    torch.testing.assert_close(logits(load_model(source, "float32", "cpu")), logits(model), atol=1e-4, rtol=1e-4)


def test_linear_scaling_and_attention_scale_of_gemma_3_are_read(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    model, path = saved(tmp_path, "gemma3_text", **changes)
    config = read_config(resolve(str(path)))
    assert config.rope_parameters == {"full_attention": GLOBAL, "sliding_attention": LOCAL}
    assert config.query_pre_attn_scalar == config.head_dim == 8
    read = load_model(resolve(str(path)), "float32", "cpu")
    torch.testing.assert_close(logits(read), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "config", "scale"),
    [
        ("gemma2", Gemma2Config(hidden_size=4608, num_attention_heads=32, head_dim=128, num_hidden_layers=46), 144),
        ("gemma3", Gemma3TextConfig(hidden_size=5376, num_attention_heads=32, head_dim=128, num_hidden_layers=62), 168),
        ("gemma3", Gemma3TextConfig(hidden_size=3840, num_attention_heads=16, head_dim=256, num_hidden_layers=48), 256),
    ],
)
def test_the_largest_gemmas_have_an_attention_scale_of_their_own(architecture: str, config: Any, scale: int) -> None:
    complete(config, "x", Path("x.gguf"), Header(architecture, config.num_hidden_layers, 0, {}, {}, {}, {}, {}))
    assert config.query_pre_attn_scalar == scale


@pytest.mark.parametrize(
    ("architecture", "rope", "facts"),
    [
        ("llama-mha", LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 4096}, ("rope_freqs.weight",)),
        ("llama-mha", YARN, ("rope_freqs.weight",)),
        ("phi3", LONGROPE | {"partial_rotary_factor": 1.0}, ("rope_factors_long.weight",)),
        ("phi3", {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}, ("4 of the 8",)),
    ],
    ids=["llama3-of-another-length", "yarn", "longrope", "partial"],
)
def test_another_rope_is_refused(
    architecture: str, rope: dict[str, Any], facts: tuple[str, ...], tmp_path: Path
) -> None:
    changes = {"num_attention_heads": 4, "sliding_window": None} if architecture == "phi3" else {}
    _, path = saved(tmp_path, architecture, rope_parameters=rope, **changes)
    with refused(str(path), *facts, "safetensors"):
        check_prunable(resolve(str(path)))
