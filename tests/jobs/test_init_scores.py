"""The init-scores job: what each metric writes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers.messages import refused
from safetensors.torch import save_file

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import resolve
from pgprune_cli.run import scores
from pgprune_cli.run.layout import DECISION_RECORD, PROVENANCE_FILE, RECIPE_FILE, SCORES_FILE
from pgprune_cli.run.provenance import read_provenance
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import METRICS
from pgprune_cli.search import preparation, scoring


@pytest.mark.parametrize("metric", METRICS)
def test_every_unit_gets_a_finite_score(metric, small, tmp_path) -> None:
    made = init_scores(small(f"scores.metric={metric}"), tmp_path)
    read = Scores.load(tmp_path)
    assert (read.metric, read.fingerprint) == (metric, made.fingerprint) == (metric, resolve("demo").fingerprint())
    config = load_model(resolve("demo"), "float32", "cpu").config
    for layer in range(config.num_hidden_layers):
        assert read.tensors[f"layers.{layer}.attention"].shape == (config.num_attention_heads,)
        assert read.tensors[f"layers.{layer}.ffn"].shape == (config.intermediate_size,)
    assert len(read.tensors) == 2 * config.num_hidden_layers
    heads, channels = config.num_key_value_heads, config.intermediate_size
    assert read.units == {name: [count] * 6 for name, count in (("attention", heads), ("ffn", channels))}
    for name, values in read.tensors.items():
        assert values.dtype == torch.float64
        assert values.isfinite().all()
        assert torch.equal(values, made.tensors[name])


def test_magnitude_is_the_size_of_a_units_weights(small, tmp_path) -> None:
    scores = init_scores(small("scores.metric=magnitude"), tmp_path)
    mlp = load_model(resolve("demo"), "float32", "cpu").model.layers[1].mlp
    weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1).double()
    order = scores.tensors["layers.1.ffn"].argsort()
    sizes = weights.square().sum(1)[order]
    assert torch.all(sizes.diff() >= -1e-9)


def test_chance_is_seeded(small, tmp_path) -> None:
    def ffn(seed: int) -> list[float]:
        recipe = small("scores.metric=random", f"seed={seed}")
        return init_scores(recipe, tmp_path).tensors["layers.0.ffn"].tolist()

    assert ffn(0) == ffn(0)
    assert ffn(0) != ffn(1)


def test_uniform_knows_no_difference(small, tmp_path) -> None:
    scores = init_scores(small("scores.metric=uniform"), tmp_path)
    assert {value for tensor in scores.tensors.values() for value in tensor.tolist()} == {1.0}


def test_only_a_calibrated_metric_reads_text(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(preparation, "calibration_text", None)
    init_scores(small("scores.metric=magnitude"), tmp_path)
    with pytest.raises(TypeError):
        init_scores(small("scores.metric=wanda-sp"), tmp_path)


def test_the_text_matters_to_a_calibrated_metric(small, tmp_path) -> None:
    other = tmp_path / "numbers.txt"
    other.write_text("1 2 3 4 5 6 7 8 9 10 11 12 " * 200)
    left = init_scores(small(), tmp_path)
    two = init_scores(small(f"calibration.corpus={other}"), tmp_path)
    assert not torch.equal(left.tensors["layers.0.ffn"], two.tensors["layers.0.ffn"])


def test_scores_that_are_no_numbers_fail_the_run_and_leave_the_old_ones(small, tmp_path, monkeypatch) -> None:
    init_scores(small("scores.metric=magnitude"), tmp_path)
    before = (tmp_path / SCORES_FILE).read_bytes()
    bad = torch.tensor([1.0, 1.0, float("nan"), *[1.0] * 5], dtype=torch.float64)
    monkeypatch.setattr(scoring, "score", lambda *_: {"layers.0.attention": bad})
    with refused("layers.0.attention", "obs", "NaN", error=RunError):
        init_scores(small(), tmp_path)
    assert (tmp_path / SCORES_FILE).read_bytes() == before


def test_scoring_again_replaces_the_scores(small, tmp_path) -> None:
    init_scores(small("scores.metric=magnitude"), tmp_path)
    init_scores(small("scores.metric=uniform"), tmp_path)
    assert Scores.load(tmp_path).metric == "uniform"
    assert {path.name for path in tmp_path.iterdir()} == {SCORES_FILE, PROVENANCE_FILE}
    assert len(read_provenance(tmp_path)) == 2


def test_the_scores_of_a_search_are_not_replaced_by_others(small, tmp_path) -> None:
    recipe, run = small("search.forward_passes=2", "scores.metric=magnitude"), tmp_path / "run"
    search(recipe, run)
    before = (run / SCORES_FILE).read_bytes()
    others = {"scores.metric=uniform": "scores.metric: magnitude → uniform", "seed=7": "seed: 0 → 7"}
    for started in (RECIPE_FILE, DECISION_RECORD):  # both are there, then only the decision
        for override, change in others.items():
            with refused(str(run), change, "--out"):
                init_scores(small("search.forward_passes=2", "scores.metric=magnitude", override), run)
        assert (run / SCORES_FILE).read_bytes() == before
        (run / SCORES_FILE).write_bytes(before[:-1])
        init_scores(recipe, run)
        assert (run / SCORES_FILE).read_bytes() == before
        if started == RECIPE_FILE:
            (run / RECIPE_FILE).unlink()
    (run / DECISION_RECORD).rename(run / "aside")
    init_scores(small("scores.metric=uniform"), run)


def test_truncated_scores_are_refused(small, tmp_path) -> None:
    init_scores(small("scores.metric=uniform"), tmp_path)
    whole = (tmp_path / SCORES_FILE).read_bytes()
    (tmp_path / SCORES_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=SCORES_FILE):  # the rest of the message is safetensors' own
        Scores.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"metric": "magnitude", "fingerprint": "0123"}])
def test_tensors_without_a_checked_record_are_not_scores(metadata, tmp_path) -> None:
    save_file({"layers.0.ffn": torch.ones(3)}, tmp_path / SCORES_FILE, metadata=metadata)
    with refused(SCORES_FILE, "pgprune init-scores"):
        Scores.load(tmp_path)


def flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1
    return bytes(damaged)


def test_every_flipped_bit_of_scores_is_noticed(small, tmp_path) -> None:
    init_scores(small("scores.metric=magnitude"), tmp_path)
    whole = (tmp_path / SCORES_FILE).read_bytes()
    for place in range(0, len(whole), 13):
        (tmp_path / SCORES_FILE).write_bytes(flipped(whole, place))
        with pytest.raises(UserError, match=r"scores\.safetensors: (damaged|not a score file)"):
            Scores.load(tmp_path)


def test_scores_of_a_newer_pgprune_are_refused(small, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scores, "VERSION", 2)
        init_scores(small("scores.metric=uniform"), tmp_path)
    with pytest.raises(UserError, match="file version 2, this one reads 1"):
        Scores.load(tmp_path)


def test_the_same_scores_are_the_same_bytes(tmp_path) -> None:
    scores = Scores({"layers.0.ffn": torch.arange(3.0, dtype=torch.float64)}, "uniform", "0123", {"ffn": [3]})
    assert len({scores.save(tmp_path).read_bytes() for _ in range(20)}) == 1
