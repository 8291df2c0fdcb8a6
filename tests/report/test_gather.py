"""Reading runs for a report: everything shown matches the files of the run directory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.recoveries import write_run

from pgprune_cli.jobs.search import search
from pgprune_cli.recipe.reader import load
from pgprune_cli.report.facts import commands, environment, evaluation, summary
from pgprune_cli.report.figures import comparison, figures_of
from pgprune_cli.report.gather import MAX_CELLS, _names, kept_cells, read_run, read_runs, sensitivities, theta_cells
from pgprune_cli.report.pareto import Measure, _marked, measures
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import CHECKPOINT_TENSORS, DECISION_RECORD

LAYERS, KV_HEADS, HEADS, CHANNELS = 6, 4, 8, 384


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_read_run_returns_what_the_search_wrote(policy, finished) -> None:
    run = read_run(finished[policy], "it")
    written = metrics_of(finished[policy])
    assert (run.progress, run.steps) == ("finished", 6)
    assert run.units == {"attention": [KV_HEADS] * LAYERS, "ffn": [CHANNELS] * LAYERS}
    assert run.elements == {"attention": [HEADS] * LAYERS, "ffn": [CHANNELS] * LAYERS}
    assert [row.losses for row in run.rows] == [row["losses"] for row in written]
    assert run.forward_passes == [0, 2, 4, 6, 8, 10, 12]
    assert run.forward_passes[-1] == run.decision.forward_passes
    decided = Decision.load(finished[policy]).model_mask
    assert run.widths == {
        "attention": [int(layer.attention.sum()) for layer in decided],
        "ffn": [int(layer.ffn.sum()) for layer in decided],
    }


def test_the_history_has_the_kept_units_of_every_evaluation(finished) -> None:
    rows = read_run(finished["units"], "it").rows
    assert [row.step for row in rows if row.kept] == [row.step for row in rows if row.heldout_loss is not None]
    best = min((row for row in rows if row.kept), key=lambda row: row.heldout_objective)
    assert best.kept == read_run(finished["units"], "it").widths  # a unit search writes the best that it evaluated


def test_theta_cells_cover_every_unit_once(finished) -> None:
    cells = theta_cells(read_run(finished["units"], "it"))
    theta = latest_checkpoint(finished["units"]).state.theta
    attention, ffn = theta.split([LAYERS * KV_HEADS, LAYERS * CHANNELS])
    assert [cell["value"] for cell in cells["attention"]] == [round(value, 4) for value in attention.tolist()]
    length = CHANNELS // MAX_CELLS
    means = ffn.view(-1, length).mean(1).tolist()
    assert [cell["value"] for cell in cells["ffn"]] == pytest.approx(means, abs=1e-4)
    assert cells["ffn"][MAX_CELLS + 2] == {
        "layer": 1,
        "first": 2 * length,
        "units": f"FFN channels {2 * length}–{3 * length - 1}",
        "value": pytest.approx(means[MAX_CELLS + 2], abs=1e-4),
    }
    assert cells["attention"][KV_HEADS + 3]["units"] == "KV head 3"


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_kept_cells_match_the_decision(policy, finished) -> None:
    cells = kept_cells(read_run(finished[policy], "it"))
    for block, count in (("attention", HEADS), ("ffn", CHANNELS)):
        kept = torch.stack([layer.of(block) for layer in Decision.load(finished[policy]).model_mask]).double()
        means = kept.view(-1, max(1, count // MAX_CELLS)).mean(1)
        assert [cell["value"] for cell in cells[block]] == [round(value, 4) for value in means.tolist()]


def test_blocks_removed_as_a_whole_have_one_cell_per_layer(finished, tmp_path) -> None:
    recipe = tmp_path / "whole.yaml"
    recipe.write_text((finished["units"] / "recipe.yaml").read_text().replace("[attention, ffn]", "[attention-block]"))
    search(load(recipe, ["search.forward_passes=2"]), tmp_path / "run")
    run = read_run(tmp_path / "run", "it")
    assert run.units == {"attention-block": [1] * LAYERS}
    assert [cell["units"] for cell in theta_cells(run)["attention-block"]] == ["the whole layer"] * LAYERS
    assert list(kept_cells(run)) == list(run.widths) == ["attention"]
    assert run.dense("attention") == [HEADS] * LAYERS


def test_a_width_search_shows_its_sensitivities(finished) -> None:
    run = read_run(finished["widths"], "it")
    assert theta_cells(run) == {}
    rows = sensitivities(run)
    assert [cell["value"] for cell in rows] == pytest.approx(run.state.mean.exp().tolist())
    assert [(cell["family"], cell["layer"]) for cell in rows[5:7]] == [("attention", 5), ("ffn", 0)]
    assert all(cell["low"] < cell["value"] < cell["high"] for cell in rows)


def test_a_running_search_is_read_up_to_its_last_complete_row(searching) -> None:
    run = read_run(searching, "it")
    assert run.progress == "step 6 of 6"
    assert run.decision is None
    assert run.widths == run.rows[-1].kept
    assert kept_cells(run) == {}
    assert ["forward passes", "12 so far"] in summary([run]).rows
    assert measures([run, run]) == []


def test_runs_are_named_by_the_part_of_the_path_that_differs(finished) -> None:
    assert [run.name for run in read_runs(list(finished.values()))] == ["units", "widths"]
    assert [run.name for run in read_runs([finished["units"], finished["units"]])] == ["units"]
    assert _names([Path("/x/flap/seed-0"), Path("/x/obs/seed-0")]) == ["flap", "obs"]
    assert _names([Path("/x/flap/seed-0"), Path("/x/flap/seed-1")]) == ["seed-0", "seed-1"]
    assert _names([Path("/x/a/one"), Path("/x/b/two")]) == ["a/one", "b/two"]


def test_a_directory_without_a_search_is_refused(tmp_path) -> None:
    with refused(str(tmp_path), "recipe.yaml", "pgprune search"):
        read_run(tmp_path, "it")


def test_a_recipe_with_unknown_keys_is_refused(searching) -> None:
    recipe = searching / "recipe.yaml"  # at the top: the message names the line, and settings are added below
    recipe.write_text("weights: int8\n" + recipe.read_text())
    with refused("recipe.yaml:", "weights"):
        read_run(searching, "it")


def test_a_run_without_provenance_is_refused(searching) -> None:
    (searching / "provenance.jsonl").unlink()
    with refused(str(searching), "provenance.jsonl"):
        read_run(searching, "it")


def test_damaged_lines_of_the_provenance_are_left_out(searching) -> None:
    whole = read_run(searching, "it").provenance
    with (searching / "provenance.jsonl").open("ab") as file:
        file.write(b'{}\nnull\n{"began": "\xff"}\n' + b"[" * 10**5 + b'\n{"command": "pgpr')
    run = read_run(searching, "it")
    assert run.provenance == whole
    assert len(commands(run).rows) == len(whole)


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_a_finished_run_is_read_without_its_damaged_checkpoint(policy, finished, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[policy], run)
    assert read_run(run, "it").state is not None
    newest = max((run / "checkpoints").iterdir())
    (newest / CHECKPOINT_TENSORS).unlink()
    without = read_run(run, "it")
    assert without.state is None and theta_cells(without) == {} and sensitivities(without) == []
    assert kept_cells(without) != {}
    (run / DECISION_RECORD).unlink()
    with refused(newest.name, "corrupt"):
        read_run(run, "it")


def test_bytes_that_are_no_text_are_refused_in_a_history_and_a_recipe(searching) -> None:
    with (searching / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")  # ends the row that is half written
    with refused("metrics.jsonl:8", "damaged"):
        read_run(searching, "it")
    (searching / "recipe.yaml").write_bytes(b"\xff")
    with refused("recipe.yaml:1", "UTF-8"):
        read_run(searching, "it")


def test_a_damaged_history_is_refused(searching) -> None:
    (searching / "metrics.jsonl").write_text("{}\n")
    with refused("metrics.jsonl"):
        read_run(searching, "it")


def test_the_tables_show_search_evaluation_commands_and_environment(finished) -> None:
    runs = read_runs(list(finished.values()))
    facts = {row[0]: row[1:] for row in summary(runs).rows}
    assert facts["seconds by phase"] == [run.decision.seconds_by_phase() for run in runs]
    assert summary(runs).headings == ["", "units", "widths"]
    assert facts["search"] == ["units on loss, 2 masks per step", "widths on loss, 2 masks per step"]
    steps = [run.decision.best_step for run in runs]
    assert facts["decision"] == [f"of step {step} of 6, the best on held-out text" for step in steps]
    assert facts["forward passes"][0].startswith("12 for the search, ")
    assert facts["computed in"] == ["float32", "float32"]
    int8 = replace(runs[0], recipe=replace(runs[0].recipe, weight_format="int8"))
    assert ["computed in", "float32, from int8 weights"] in summary([int8]).rows
    assert evaluation(runs).rows == [["parameters", "7", "7"], ["demo PPL, 128 tokens", "4.50", "3.25"]]
    assert [row[2] for row in commands(runs[0]).rows] == ["pgprune search demo --out 'a run'"]
    assert runs[0].repeat_command.startswith("pgprune search ")
    versions = {row[0]: row[1] for row in environment(runs).rows}
    assert versions["torch"] == metadata.version("torch")
    assert {"python", "pgprune", "processor", "memory"} <= versions.keys()


def test_the_loss_figure_shows_what_the_search_minimises(small, tmp_path) -> None:
    search(small("search.objective=kl"), tmp_path / "run")
    run = read_run(tmp_path / "run", "it")
    layers = next(figures_of(run, "it")).spec["layer"]
    points = [point for layer in layers for point in layer.get("data", {"values": []})["values"]]
    evaluated = [point for point in points if point["of"] == "decision, on held-out text"]
    rows = [row for row in run.rows if row.heldout_objective is not None]
    objectives = [*(row.heldout_objective for row in rows), run.decision.heldout_objective]
    losses = [*(row.heldout_loss for row in rows), run.decision.heldout_loss]
    assert [point["loss"] for point in evaluated] == [round(value, 5) for value in objectives]
    assert all(abs(objective - loss) > 0.1 for objective, loss in zip(objectives, losses, strict=True))


def test_the_tables_show_the_duration_and_the_most_memory(finished, tmp_path) -> None:
    run = read_run(finished["units"], "it")
    sizes = [1, 3, 2, *[1] * len(run.rows)]
    for seconds, shown in ((59.6, "1 min 0 s"), (42, "42 s"), (754, "12 min 34 s"), (7384, "2 h 3 min")):
        rows = [replace(row, memory_bytes=size * 10**9) for row, size in zip(run.rows, sizes, strict=False)]
        rows[-1] = replace(rows[-1], seconds=seconds)
        facts = dict(summary([replace(run, rows=rows)]).rows)
        assert (facts["search time"], facts["peak memory"]) == (shown, "3.0 GB")
    write_run(tmp_path / "recovery", 4)
    (recovery,) = read_runs([tmp_path / "recovery"])
    rows = [replace(row, memory_bytes=size * 10**9) for row, size in zip(recovery.rows, sizes, strict=False)]
    facts = dict(summary([replace(recovery, rows=rows)]).rows)
    assert (facts["training time"], facts["speed"], facts["peak memory"]) == ("8 s", "500 tokens/s", "3.0 GB")


def test_only_perplexities_of_the_same_text_are_compared(finished) -> None:
    on_text, heldout = measures(read_runs(list(finished.values())))
    assert on_text.name == "demo perplexity, 128 tokens"
    assert [(point["run"], point["ppl"]) for point in on_text.points] == [("units", 4.5), ("widths", 3.25)]
    assert heldout.name == "held-out perplexity"
    runs = read_runs(list(finished.values()))
    runs[0].measured["perplexity"][0]["tokens"] = 98  # another text, or only a part of it
    assert [measure.name for measure in measures(runs)] == ["held-out perplexity"]


def test_perplexities_with_and_without_bos_are_not_compared(finished) -> None:
    units, widths = read_runs(list(finished.values()))
    units.measured["perplexity"][0]["bos"] = True
    with_bos = replace(units, decision=replace(units.decision, bos=True))
    assert [measure.name for measure in measures([units, widths])] == ["held-out perplexity"]
    assert measures([with_bos, widths]) == []
    on_text, heldout = measures([with_bos, replace(with_bos, name="other")])
    assert (on_text.name, heldout.name) == ("demo perplexity, 128 tokens, with BOS", "held-out perplexity, with BOS")
    assert {row[0] for row in evaluation([units, widths]).rows} > {"demo PPL, 128 tokens, with BOS"}
    facts = {row[0]: row[1:] for row in summary([with_bos, widths]).rows}
    assert facts["held-out loss"][0] == "" and facts["held-out loss, with BOS"][1] == ""
    figures = {figure.id: json.dumps(figure.spec) for figure in comparison([with_bos, widths], [])}
    assert "widths" in figures["heldout"] and "units" not in figures["heldout"]
    assert "units" in figures["heldout-bos"]


def test_the_best_runs_are_those_that_no_other_beats_in_both() -> None:
    def best(*points: tuple[str, float, float]) -> list[bool]:
        rows = [{"run": "r", "model": model, "sparsity": sparsity, "ppl": ppl} for model, sparsity, ppl in points]
        return [point["best"] for point in Measure("it", _marked(rows)).points]

    assert best(("a", 0.5, 9.0), ("a", 0.3, 8.0), ("a", 0.3, 8.5), ("a", 0.4, 9.5)) == [True, True, False, False]
    assert best(("a", 0.5, 9.0), ("a", 0.5, 9.0)) == [True, True]
    assert best(("a", 0.5, 9.0), ("b", 0.4, 10.0)) == [True, True]  # perplexities of different models are not compared
