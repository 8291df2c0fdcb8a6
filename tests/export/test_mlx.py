"""Exports for MLX, without MLX."""

from __future__ import annotations

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
