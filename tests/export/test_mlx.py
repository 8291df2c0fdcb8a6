"""Exports for MLX, without MLX."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from helpers.exports import DECISIONS, decide
from helpers.masks import draw
from helpers.messages import refused
from helpers.models import tiny_model

from pgprune_cli.export import mlx
from pgprune_cli.export.plan import Options
from pgprune_cli.model.source import resolve


def test_a_family_that_the_file_for_mlx_does_not_compute_is_refused(tmp_path):
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path / "base")
    decision = decide(tmp_path / "base", draw(model, DECISIONS["mixed sizes"]))
    with refused("--format mlx", "gemma2", *mlx.FAMILIES, "--format hf"):
        mlx.plan(resolve(str(tmp_path / "base")), decision, Options())


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("rope", "fact"),
    [
        (YARN, ""),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": None}, ""),
        (LINEAR | {"rope_type": "default", "partial_rotary_factor": 0.5}, ""),
        (LINEAR | {"rope_type": "dynamic"}, "dynamic"),
        (LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor of 0.5"),
        (YARN | {"attention_factor": 1.0}, "attention_factor of 1.0"),
        (YARN | {"truncate": False}, "truncate: false"),
        (YARN | {"mscale": 0.7}, "mscale_all_dim"),
    ],
    ids=["yarn", "mscales", "default", "dynamic", "partial", "attention-factor", "truncate", "mscale"],
)
def test_rope_parameters_that_mlx_lm_overlooks_are_refused(rope, fact, tmp_path):
    model = tiny_model("llama-gqa")
    model.config.rope_parameters = rope
    model.save_pretrained(tmp_path / "base")
    decision = decide(tmp_path / "base", draw(model, DECISIONS["mixed sizes"]))
    with refused("--format mlx", "rope_parameters", fact, "--format hf") if fact else nullcontext():
        mlx.plan(resolve(str(tmp_path / "base")), decision, Options())
