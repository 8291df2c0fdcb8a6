"""The longest context of a model, with every kind of RoPE scaling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.messages import refused
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from pgprune_cli.model.context import longest_context, refuse_longer_windows

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        pytest.param(LlamaConfig(max_position_embeddings=4096), 4096, id="no scaling"),
        pytest.param(MistralConfig(max_position_embeddings=32768, sliding_window=4096), 32768, id="sliding window"),
        pytest.param(  # Qwen2.5 as its card says: the length before scaling stays in max_position_embeddings
            Qwen2Config(
                max_position_embeddings=32768,
                rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
            id="yarn before scaling",
        ),
        pytest.param(
            Qwen2Config(
                max_position_embeddings=131072,
                rope_scaling={"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
            ),
            131072,
            id="yarn after scaling",
        ),
        pytest.param(
            LlamaConfig(
                max_position_embeddings=131072,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
            131072,
            id="llama3",
        ),
        pytest.param(
            LlamaConfig(max_position_embeddings=4096, rope_scaling={"type": "dynamic", "factor": 2.0}),
            8192,
            id="dynamic",
        ),
        pytest.param(
            LlamaConfig(max_position_embeddings=16384, rope_scaling={"type": "linear", "factor": 4.0}),
            16384,
            id="linear",
        ),
        pytest.param(
            Phi3Config(max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling=LONGROPE),
            131072,
            id="longrope",
        ),
        pytest.param(Gemma3TextConfig(max_position_embeddings=32768, sliding_window=512), 32768, id="two ropes"),
        pytest.param(SimpleNamespace(), None, id="unknown"),
        pytest.param(SimpleNamespace(max_position_embeddings=None), None, id="null"),
        pytest.param(SimpleNamespace(max_position_embeddings="many"), None, id="nonsense"),
        pytest.param(SimpleNamespace(max_position_embeddings=64, rope_parameters=[1]), 64, id="odd parameters"),
    ],
)
def test_longest_context(config, longest) -> None:
    assert longest_context(config) == longest


def test_windows_longer_than_the_context_are_refused_and_others_are_not() -> None:
    config = LlamaConfig(max_position_embeddings=512)
    refuse_longer_windows(config, "some/model", {"calibration.seqlen": 512})
    refuse_longer_windows(SimpleNamespace(), "some/model", {"calibration.seqlen": 10**6})
    with refused("scores.seqlen", "513", "512", "some/model"):
        refuse_longer_windows(config, "some/model", {"calibration.seqlen": 128, "scores.seqlen": 513})
