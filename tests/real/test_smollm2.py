"""A real model from search to evaluation: SmolLM2-135M, C4 calibration, WikiText-2. Few forward passes, yet minutes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.multiple_choice import by_hand, task_file

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.perplexity import perplexity
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.targets import open_target
from pgprune_cli.jobs.tasks import load_tasks, measure_tasks
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import SCORES_FILE

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def model() -> str:
    if not list(MODEL.glob("*.gguf")):
        pytest.skip("no real model here: scripts/fetch_smollm2.sh fetches it into models/smollm2-135m")
    return str(MODEL)


def short_recipe(model: str, corpus: Path, forward_passes: int) -> Recipe:
    return load(
        find("smollm2-135m-30"),
        [
            f"model={model}",
            f"calibration.corpus={corpus}",
            f"search.forward_passes={forward_passes}",
            "search.policy=units",
            "search.masks_per_step=2",
            "start.temperature=0.3",
            "search.learning_rate=2e-2",
            "repair.method=none",
            "scores.metric=wanda-sp",
            "budget.scope=per-family",
            "scores.windows=16",
            "scores.seqlen=512",
        ],
    )


def test_the_dense_model_has_its_known_perplexity(model: str, shared: Path) -> None:
    """It is 55.3 on 128 windows of 128 tokens with bfloat16 weights, measured independently of this code."""
    target = open_target(model, dtype="bfloat16", device="cpu")
    tokens = tokens_of(str(shared / "data" / "wikitext2.test.txt"), "evaluation", load_tokenizer(target.source))
    ppl, predicted = perplexity(target.module, tokens, seqlen=128, max_windows=128)
    assert predicted == 128 * 127
    assert ppl == pytest.approx(55.3, rel=0.02)


def test_a_short_search_beats_the_metric_and_its_export_equals_the_masked_model(
    model: str, shared: Path, tmp_path: Path
) -> None:
    corpus = shared / "data" / "c4.sample.txt"
    init_scores(short_recipe(model, corpus, 0), tmp_path / "metric")
    metric_only = search(short_recipe(model, corpus, 0), tmp_path / "metric")
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "metric" / SCORES_FILE, tmp_path / "run")
    searched = search(short_recipe(model, corpus, 24), tmp_path / "run")
    assert searched.sparsity == pytest.approx(0.3, abs=1e-3)
    assert searched.heldout_loss < metric_only.heldout_loss - 0.5

    plan = export(tmp_path / "run", tmp_path / "small")
    assert plan.parameters_after < 0.8 * plan.parameters_before
    pruned = open_target(str(tmp_path / "run"), dtype="bfloat16", device="cpu")
    exported = open_target(str(tmp_path / "small"), dtype="bfloat16", device="cpu")
    assert exported.parameters == pruned.parameters == plan.parameters_after
    tokenizer = load_tokenizer(resolve(str(tmp_path / "small")))
    tokens = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    for target in (pruned, exported):  # computes on the stored bfloat16 weights in float32
        target.module.float()
    with torch.inference_mode():
        expected = pruned.module(tokens).logits
        torch.testing.assert_close(exported.module(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_accuracies_on_hellaswag_equal_those_of_a_plain_loop(model: str, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'pgprune[eval]'")
    lines = (shared / "data" / "hellaswag.dev.jsonl").read_text().splitlines()[:20]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(lines))
    task = task_file(tmp_path, tmp_path / "hellaswag.jsonl", "hellaswag_local")
    target = open_target(model, dtype="float32", device="cpu")
    rows = measure_tasks(target, load_tasks([str(task)]))
    expected = by_hand(target.module, load_tokenizer(target.source), [json.loads(line) for line in lines])
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(expected)
