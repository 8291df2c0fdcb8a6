"""How saved work is described, for directories made by hand."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.cli.saved import (
    saved_by_compare,
    saved_by_export,
    saved_by_init_scores,
    saved_by_recover,
    saved_by_search,
)
from pgprune_cli.run.layout import DECISION_RECORD, MEASURED_FILE, RECOVERY_RECORD, SCORES_FILE


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_saved_by_search_describes_the_latest_saved_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    texts = [saved_by_search(run, 20).text]
    for name in (
        SCORES_FILE,
        "widths/layer-00000.safetensors",
        "widths/layer-00007.safetensors",
        "checkpoints/.step-00000010.tmp/state.json",  # being written
        "checkpoints/step-00000005/state.json",
        "checkpoints/step-00000010/state.json",
    ):
        touch(run / name)
        texts.append(saved_by_search(run, 20).text)
    texts.append(saved_by_search(run, 20, step=11).text)
    touch(run / DECISION_RECORD)
    assert [*texts, saved_by_search(run, 20).text] == [
        "nothing is saved yet",
        f"the scores are saved in {run}, but no search step yet",
        f"the scores and the width tables of 1 layer are saved in {run}",
        f"the scores and the width tables of 2 layers are saved in {run}",
        f"the scores and the width tables of 2 layers are saved in {run}",
        f"step 5 of 20 is saved in {run}",
        f"step 10 of 20 is saved in {run}",
        f"step 11 of 20 is saved in {run}",
        f"the decision is saved in {run}",
    ]


def test_saved_by_recover_names_the_last_step_or_the_predictions(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert saved_by_recover(run, 0, cache).text == "nothing is saved yet"
    touch(cache / "key/predictions-00000.safetensors")
    assert saved_by_recover(run, 0, cache).text == f"the dense model's predictions so far are saved in {cache}"
    touch(run / "teacher/predictions-00000.safetensors")
    assert saved_by_recover(run).text == f"the dense model's predictions so far are saved in {run / 'teacher'}"
    touch(run / "checkpoints/checkpoint-7/state.json")
    assert saved_by_recover(run).text == f"step 7 is saved in {run}"
    assert saved_by_recover(run, 9).text == f"step 9 is saved in {run}"


def test_saved_by_recover_describes_the_latest_saved_state(tmp_path: Path) -> None:
    run = tmp_path / "run"
    texts = [saved_by_recover(run).text]
    for name in (
        "checkpoints/checkpoint-10/state.json",
        "checkpoints/checkpoint-20/optimizer.pt",  # being written
        "checkpoints/checkpoint-9/state.json",
    ):
        touch(run / name)
        texts.append(saved_by_recover(run).text)
    texts.append(saved_by_recover(run, step=11).text)
    assert texts == [
        "nothing is saved yet",
        *[f"step 10 is saved in {run}"] * 3,
        f"step 11 is saved in {run}",
    ]
    touch(run / RECOVERY_RECORD)
    assert saved_by_recover(run) == (f"the recovery in {run} is finished", True)


def test_saved_by_compare_counts_measured_runs_and_names_the_interrupted_one(tmp_path: Path) -> None:
    runs = [(tmp_path / name / "seed-0", steps) for name, steps in (("metric", 0), ("layers", 20), ("start", 160))]
    touch(runs[0][0] / MEASURED_FILE)
    touch(runs[0][0] / DECISION_RECORD)
    assert saved_by_compare(tmp_path, runs).text == f"1 of 3 runs are measured in {tmp_path}"
    touch(runs[1][0] / "checkpoints/step-00000004/state.json")
    assert saved_by_compare(tmp_path, runs).text == (
        f"1 of 3 runs are measured in {tmp_path}, and step 4 of 20 of layers/seed-0 is saved"
    )


def test_saved_scores_and_exports_are_complete_or_absent(tmp_path: Path) -> None:
    assert saved_by_init_scores(tmp_path).text == "nothing is saved yet"
    touch(tmp_path / SCORES_FILE)
    assert saved_by_init_scores(tmp_path).text == f"the scores are saved in {tmp_path}"
    out = tmp_path / "small.gguf"
    assert saved_by_export(out, "me/mine") == (f"nothing is written to {out}", False)
    touch(out)
    assert saved_by_export(out) == (f"{out} is complete", True)
    assert saved_by_export(out, "me/mine") == (f"{out} is complete. Upload it with: hf upload me/mine {out}", True)
