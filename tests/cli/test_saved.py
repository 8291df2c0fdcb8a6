"""What is said to be saved, of directories made by hand."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.cli.saved import of_comparison, of_export, of_scores, of_search
from pgprune_cli.run.layout import DECISION_RECORD, MEASURED_FILE, SCORES_FILE


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_search_is_saved_as_far_as_it_has_come(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = [of_search(run, 20).text]
    for name in (
        SCORES_FILE,
        "widths/layer-00000.safetensors",
        "widths/layer-00007.safetensors",
        "checkpoints/.step-00000010.tmp/state.json",  # being written
        "checkpoints/step-00000005/state.json",
        "checkpoints/step-00000010/state.json",
    ):
        put(run / name)
        said.append(of_search(run, 20).text)
    said.append(of_search(run, 20, step=11).text)
    put(run / DECISION_RECORD)
    assert [*said, of_search(run, 20).text] == [
        "nothing is saved yet",
        f"the scores are saved in {run}, of the search nothing yet",
        f"the scores and the widths of 1 layer are saved in {run}",
        f"the scores and the widths of 2 layers are saved in {run}",
        f"the scores and the widths of 2 layers are saved in {run}",
        f"step 5 of 20 is saved in {run}",
        f"step 10 of 20 is saved in {run}",
        f"step 11 of 20 is saved in {run}",
        f"the decision is saved in {run}",
    ]


def test_a_comparison_counts_its_runs_and_names_the_one_that_was_stopped(tmp_path: Path) -> None:
    runs = [(tmp_path / name / "seed-0", steps) for name, steps in (("metric", 0), ("layers", 20), ("start", 160))]
    put(runs[0][0] / MEASURED_FILE)
    put(runs[0][0] / DECISION_RECORD)
    assert of_comparison(tmp_path, runs).text == f"1 of 3 runs are measured in {tmp_path}"
    put(runs[1][0] / "checkpoints/step-00000004/state.json")
    assert of_comparison(tmp_path, runs).text == (
        f"1 of 3 runs are measured in {tmp_path}, and step 4 of 20 of layers/seed-0 is saved"
    )


def test_scores_and_exports_are_whole_or_absent(tmp_path: Path) -> None:
    assert of_scores(tmp_path).text == "nothing is saved yet"
    put(tmp_path / SCORES_FILE)
    assert of_scores(tmp_path).text == f"the scores in {tmp_path} are whole"
    out = tmp_path / "small.gguf"
    assert of_export(out, "me/mine") == (f"nothing is written to {out}", False)
    put(out)
    assert of_export(out) == (f"{out} is written whole", True)
    assert of_export(out, "me/mine") == (f"{out} is written whole; to upload it: hf upload me/mine {out}", True)
