"""Searches by valid but odd recipes: every key at the ends of its range."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest
from helpers.inputs import accepted_or_refused, examples
from helpers.recipes import SMALL
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.demo.grammar import generate
from pgprune_cli.jobs.search import search
from pgprune_cli.recipe import schema
from pgprune_cli.recipe.reader import _KINDS, find, load

HUGE = [1, 2, 3, 10**6, 2**31 - 1, 10**30]
FRACTIONS = [0, 1e-9, 0.3, 0.5, 0.999999]
KEYS: dict[str, list[object]] = {
    "seed": [0, 2**32 - 1],
    "dtype": ["float32", "float16", "bfloat16", "auto"],
    "weight_format": ["full", "int8", "fp8"],
    **{f"calibration.{key}": HUGE for key in ("windows", "seqlen", "batch", "heldout")},
    "calibration.bos": ["auto", "true", "false"],
    "units.families": ["[attention]", "[ffn]", "[layer]", "[attention-block, ffn]", "[attention-block, ffn-block]"],
    "budget.sparsity": FRACTIONS,
    "budget.measure": ["parameters", "flops", "kv-cache"],
    "budget.scope": ["per-family", "global", "per-layer"],
    "budget.context": [1, 3, 2**20],
    **{f"budget.{key}": FRACTIONS for key in ("min_keep", "keep_first", "keep_last")},
    "budget.ffn_multiple": HUGE,
    "scores.metric": list(get_args(schema.MetricName)),
    "scores.windows": HUGE,
    "scores.seqlen": HUGE,
    "start.mapping": ["sigmap", "linear", "rank", "global-rank"],
    "start.temperature": [1e-300, 1e-9, 1.0, 1e300],
    "search.policy": ["widths", "units"],
    "search.objective": ["loss", "kl", "kl-hidden"],
    "search.forward_passes": [0, 1, 5, 12],
    "search.masks_per_step": [2, 3, 10**6, 2**31 - 1],
    "search.estimator": ["paper", "rloo"],
    "search.learning_rate": [0, 1e-300, 1.0, 1e300],
    "search.schedule": ["cosine", "constant"],
    "search.checkpoint_every": HUGE,
    "search.evaluate_every": HUGE,
    "repair.method": ["none", "bias", "least-squares", "least-squares-bias", "sublayer"],
    "repair.epochs": [1, 2],
    "repair.last_layers": [0, 1, 2, 9],
    "repair.windows": [1, 2, 16, 10**30],
    "repair.sampled_windows": [0, 1, 7],
    "repair.damping": [1e-300, 1e-3, 1e300],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("searches") / "text.txt"
    path.write_text(generate(5, 6000))
    return path


def test_every_key_of_a_recipe_is_varied() -> None:
    """Except what says where the search runs and on what, and the sections that a search does not read."""
    fixed = {"model", "device", "calibration.corpus"}
    sections = {key.partition(".")[0] for key in _KINDS if "." in key}
    unread = {key for key in _KINDS if key.partition(".")[0] in ("recover", "evaluation")}
    assert set(_KINDS) - fixed - sections - unread == set(KEYS)


@examples(12, shrink=False)
@given(data=st.data())
def test_a_search_with_extreme_values_runs_or_is_refused(text: Path, data) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=4, unique=True))
    overrides = [f"{key}={data.draw(st.sampled_from(KEYS[key]))}" for key in keys]
    with accepted_or_refused("recipes, searched"):
        recipe = load(find("demo"), [*SMALL, f"calibration.corpus={text}", "repair.windows=8", *overrides])
        shutil.rmtree(text.parent / "run", ignore_errors=True)
        decision = search(recipe, text.parent / "run")
        assert 0 <= decision.sparsity <= 1
