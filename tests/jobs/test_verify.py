"""verify: every artefact is intact as written, and every damage is one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused, says
from helpers.models import VOCABULARY, tiny_model
from helpers.recipes import SMALL
from helpers.recoveries import write_run
from helpers.runs import finished_run
from safetensors.torch import load_file, save

from pgprune_cli.export import checksums, gguf_checksum
from pgprune_cli.jobs import verify as verify_job
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recover import teacher_cache
from pgprune_cli.recover.checkpoints import TrainingCheckpoint, finish
from pgprune_cli.recover.teacher import LiveTeacher
from pgprune_cli.recover.teacher_cache import CacheKey, record_of
from pgprune_cli.recover.teacher_writing import cached_teacher
from pgprune_cli.recover.texts import RecoveryText
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import (
    COMPARISON_RECORD,
    COSTS_FILE,
    DECISION_MASKS,
    DECISION_RECORD,
    EVALUATION_FILE,
    MEASURED_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    REPAIR_FILE,
    SCORES_FILE,
    TEACHER_RECORD,
    teacher_shard,
    training_checkpoint_folder,
)
from pgprune_cli.run.scores import Scores
from pgprune_cli.run.training_history import TrainingHistory
from pgprune_cli.storage.records import read_record, write_record


def flip(path: Path, place: float = 0.7) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def faults(path: Path) -> list[str]:
    """Return what `verify` finds, which is one line per fault."""
    lines = verify(path).faults
    assert not any("\n" in line for line in lines)
    return list(lines)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of the demo model with checkpoints, a repair, costs and an evaluation."""
    run = tmp_path_factory.mktemp("searched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", str(run.parent / "cache"))
        search(load(find("demo"), [*SMALL, "search.checkpoint_every=2", "repair.method=bias"]), run)
    write_record(run / EVALUATION_FILE, {})
    write_record(run / COSTS_FILE, {"attention": [[3, 1, 0], [4, 0, 0]], "ffn": [[1, 0, 0], [1, 0, 0]]})
    return run


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


PARTS = [RECIPE_FILE, SCORES_FILE, METRICS_FILE, COSTS_FILE, DECISION_RECORD, EVALUATION_FILE]


def test_a_run_is_intact(run: Path) -> None:
    verdict = verify(run)
    assert (verdict.kind, verdict.faults) == ("run directory", [])
    assert set(verdict.checked) == {*PARTS, "checkpoints"}
    assert verdict.text().startswith(f"{run}: intact (run directory): ")


@pytest.mark.parametrize("part", [SCORES_FILE, DECISION_RECORD, DECISION_MASKS, REPAIR_FILE])
def test_a_part_of_a_run_can_be_verified_alone(part: str, run: Path) -> None:
    assert faults(run / part) == []


def test_a_checkpoint_can_be_verified_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = max((run / "checkpoints").iterdir())
    assert verify(newest).kind == verify(newest / "state.json").kind == "checkpoint"
    assert faults(newest) == []
    (newest / "folder").mkdir()
    for directory, path in ((newest, "."), (newest, "state.json"), (newest / "folder", "..")):
        monkeypatch.chdir(directory)
        assert (verify(Path(path)).kind, faults(Path(path))) == ("checkpoint", [])
    flip(newest / "state.safetensors")
    (fault,) = faults(newest)
    assert fault.startswith(f"{newest}: ")


def test_an_unfinished_run_is_intact(run: Path) -> None:
    for part in (DECISION_RECORD, DECISION_MASKS, REPAIR_FILE, EVALUATION_FILE):
        (run / part).unlink()
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 7, "los')  # as a killed search leaves it
    assert faults(run) == []


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (damage, part)
        for damage in (cut, empty)
        for part in (*PARTS, DECISION_MASKS, REPAIR_FILE)
        if (damage, part) != (cut, RECIPE_FILE)  # a recipe that lost its last bytes may still be a recipe
    ],
)
def test_damage_of_a_run_is_one_line_that_names_the_file(damage: Callable, part: str, run: Path) -> None:
    damage(run / part)
    lines = faults(run)
    assert str(run / part) in lines[0]
    if part != METRICS_FILE:  # each of the checkpoints notices a truncated history
        assert len(lines) == 1, lines


@pytest.mark.parametrize("part", [DECISION_MASKS, REPAIR_FILE])
def test_a_flipped_bit_of_a_decision_is_found(part: str, run: Path) -> None:
    flip(run / part)
    (fault,) = faults(run)
    assert str(run / part) in fault


def test_nan_in_any_refitted_weight_and_a_weight_that_does_not_fit_are_found(run: Path) -> None:
    decision = Decision.load(run)
    key = next(iter(decision.repaired))
    own, place = decision.repaired[key], f"layers.{key[0]}.{key[1]}"
    for changed, facts in (
        (own._replace(inner={"up_proj.weight": torch.ones(2, 3)}), ()),
        (own._replace(inner={"up_proj.weight": torch.full((2, 3), torch.nan)}), (f"{place}.up_proj.weight", "NaN")),
        (own._replace(weight=torch.full_like(own.weight, torch.inf)), (f"{place}.weight", "infinity")),
        (own._replace(weight=own.weight[:, 1:]), (place, "does not fit")),
    ):
        replace(decision, repaired={key: changed}).save(run)
        lines = faults(run)
        assert len(lines) == bool(facts)
        if facts:
            says(lines[0], str(run / REPAIR_FILE), *facts)


def test_every_damaged_checkpoint_is_named(run: Path) -> None:
    older, newest = sorted((run / "checkpoints").iterdir())
    flip(newest / "state.safetensors")
    assert len(faults(run)) == 1
    (older / "state.json").unlink()
    lines = faults(run)
    assert [older.name in lines[0], newest.name in lines[1]] == [True, True]


def test_scores_with_nan_or_without_a_layer_are_found(run: Path) -> None:
    tensors = load_file(run / SCORES_FILE)
    scores = Scores.load(run)
    with_nan = {**tensors, "layers.0.ffn": tensors["layers.0.ffn"] * float("nan")}
    replace(scores, tensors=with_nan).save(run)
    (fault,) = faults(run)
    says(fault, str(run / SCORES_FILE), "layers.0.ffn", "NaN")
    del tensors["layers.0.ffn"]
    replace(scores, tensors=tensors).save(run)
    says(faults(run / SCORES_FILE)[0], str(run / SCORES_FILE), "every layer")


def test_scores_of_another_model_are_found(run: Path) -> None:
    scores = Scores.load(run)
    replace(scores, fingerprint="0" * 64).save(run)
    (fault,) = faults(run)
    says(fault, str(run), SCORES_FILE, DECISION_RECORD)


def test_a_base_model_that_changed_since_the_search_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    finished_run(run)
    (run / RECIPE_FILE).write_text("dtype: float32\n")
    record = read_record(run / DECISION_RECORD) | {"base": resolve("base").fingerprint_parts()}
    write_record(run / DECISION_RECORD, record)
    monkeypatch.setattr(verify_job, "_check_recipe", lambda run: [])
    assert faults(run / DECISION_RECORD) == []
    weights = load_file("base/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -3
    Path("base/model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    [fault] = faults(run / DECISION_RECORD)
    says(fault, "base: not the model that was searched", "differs: model.layers.1.")
    shutil.rmtree("base")
    assert faults(run / DECISION_RECORD) == []


def test_an_empty_line_of_the_history_and_a_cost_of_zero_are_found(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")  # they hold a checksum of the history
    rows = (run / METRICS_FILE).read_text().splitlines()
    (run / METRICS_FILE).write_text("\n".join([rows[0], " " * len(rows[1]), *rows[2:]]) + "\n")
    write_record(run / COSTS_FILE, {"attention": [[0, 0, 0]], "ffn": [[2, 0, 0]]})
    history, costs = faults(run)
    says(history, f"{run / METRICS_FILE}:2", "'step'")
    says(costs, str(run / COSTS_FILE), "attention")


@pytest.mark.parametrize("part", [COSTS_FILE, EVALUATION_FILE, MEASURED_FILE])
def test_a_changed_digit_in_a_record_is_found(part: str, run: Path) -> None:
    write_record(run / part, {"attention": [[3, 0, 0], [4, 0, 0]], "ffn": [[5, 0, 0], [6, 0, 0]]})
    assert faults(run) == faults(run / part) == []
    (run / part).write_text((run / part).read_text().replace("6", "7", 1))
    (fault,) = faults(run)
    assert fault.startswith(f"{run / part}: ")
    assert faults(run / part) == [fault]


def test_a_changed_digit_in_the_history_is_found_by_every_checkpoint(run: Path) -> None:
    (run / METRICS_FILE).write_text((run / METRICS_FILE).read_text().replace('"step": 1,', '"step": 7,'))
    assert [line.startswith(f"{run / METRICS_FILE}: ") for line in faults(run)] == [True, True]


def test_a_recipe_of_another_run_is_found(run: Path) -> None:
    (run / RECIPE_FILE).write_text((run / RECIPE_FILE).read_text().replace("seed: 0", "seed: 7"))
    (fault,) = faults(run)
    assert fault.startswith(f"{run / DECISION_RECORD}: ") and RECIPE_FILE in fault


def test_a_comparison_is_verified_with_its_table_and_its_measurements(tmp_path: Path) -> None:
    records = (tmp_path / COMPARISON_RECORD, tmp_path / "dense" / MEASURED_FILE)
    for path in records:
        write_record(path, {"seconds": 1})
    assert verify(tmp_path).checked == [COMPARISON_RECORD, "dense"]
    for path in records:
        path.write_text(path.read_text().replace("1", "2", 1))
        (fault,) = faults(path)
        assert fault.startswith(f"{path}: ")
    assert len(faults(tmp_path)) == 2


def test_a_comparison_is_verified_with_all_its_runs(run: Path, tmp_path: Path) -> None:
    shutil.move(run, tmp_path / "out" / "widths" / "seed-0")
    write_record(tmp_path / "out" / COMPARISON_RECORD, {})
    verdict = verify(tmp_path / "out")
    assert (verdict.kind, verdict.checked, verdict.faults) == ("comparison", [COMPARISON_RECORD, "widths/seed-0"], [])
    flip(tmp_path / "out" / "widths" / "seed-0" / DECISION_MASKS)
    assert len(faults(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["nothing", "folder", "model", "notes.txt", "other.gguf"])
def test_a_path_that_pgprune_did_not_write_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "other.gguf").write_bytes(b"GGUF" + bytes(99))
    with refused(name):
        verify(tmp_path / name)


# --- exported models


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export one run in every format."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finished_run(Path("run"))
        for format, out in (("hf", "hf"), ("mlx", "mlx"), ("gguf", "small.gguf")):
            export(Path("run"), Path(out), format=format)
    return folder


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "exported"))


@pytest.mark.parametrize("name", ["hf", "mlx", "small.gguf"])
def test_an_exported_model_is_intact(name: str, exported: Path) -> None:
    assert faults(exported / name) == []


def test_sha256sum_reads_the_list_of_checksums(out: Path) -> None:
    import subprocess

    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    check = ["sha256sum", "--check", "--quiet", "--strict", checksums.CHECKSUMS_FILE]
    assert subprocess.run(check, cwd=out / "hf", check=False).returncode == 0
    flip(out / "hf" / "model.safetensors")
    assert subprocess.run(check, cwd=out / "hf", check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_damage_of_every_file_of_an_export_is_one_line(damage: Callable, out: Path) -> None:
    listed = [
        path
        for path in (out / "mlx").iterdir()
        if path.name not in (checksums.CHECKSUMS_FILE, checksums.MODEL_CARD) and path.suffix != ".py"
    ]
    assert len(listed) > 6
    for path in listed:
        content = path.read_bytes()
        damage(path)
        assert [line.startswith(f"{path}: ") for line in faults(out / "mlx")] == [True], path
        path.write_bytes(content)
    assert faults(out / "mlx") == []


@pytest.mark.parametrize("place", [0.0, 0.01, 0.5, 0.999])
def test_damage_of_a_gguf_file_is_found(place: float, out: Path) -> None:
    flip(out / "small.gguf", place)
    (fault,) = faults(out / "small.gguf")
    says(fault, str(out / "small.gguf"))


def test_a_truncated_gguf_file_is_found(out: Path) -> None:
    cut(out / "small.gguf")
    assert len(faults(out / "small.gguf")) == 1


def test_a_gguf_file_is_read_in_pieces(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_checksum, "BYTES_AT_A_TIME", 4096)
    assert faults(out / "small.gguf") == []


def test_the_model_card_may_be_edited(out: Path) -> None:
    (out / "hf" / checksums.MODEL_CARD).write_text("my own words")
    (out / "hf" / ".gitattributes").touch()
    assert faults(out / "hf") == []


def test_a_file_name_with_a_newline_is_reported_in_one_line(out: Path) -> None:
    (out / "hf" / "a\n\x1b[2J.py").touch()
    (fault,) = faults(out / "hf")
    says(fault, f"{out / 'hf'}/a\\n\\x1b[2J.py: ")


def test_a_damaged_or_missing_list_of_checksums_is_found(out: Path) -> None:
    (out / "hf" / checksums.CHECKSUMS_FILE).write_text("0" * 64 + "  ../config.json\n")
    says(faults(out / "hf")[0], checksums.CHECKSUMS_FILE, "damaged")
    (out / "hf" / checksums.CHECKSUMS_FILE).unlink()
    says(faults(out / "hf")[0], checksums.CHECKSUMS_FILE, "missing")


# --- code in exported models


def test_foreign_code_is_found_even_if_it_is_listed(out: Path) -> None:
    """An attacker who changes the code can change the list of checksums as well."""
    path = out / "hf" / "modeling_pruned.py"
    path.write_text(path.read_text() + "\nimport os\n")
    (out / "hf" / "tokenization_x.py").touch()
    (out / "hf" / checksums.CHECKSUMS_FILE).unlink()
    checksums.write_checksums(out / "hf")
    changed, added = faults(out / "hf")
    says(changed, str(path))
    says(added, str(out / "hf" / "tokenization_x.py"))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"auto_map": {"AutoModel": "someone/repo--x.Y"}}, "someone/repo--x.py"),
        ("config.json", {"model_file": "../x.py"}, "../x.py"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "x.Y"]}}, "x.py"),
        ("tokenizer_config.json", {"auto_map": ["x.Y", None]}, "x.py"),
    ],
)
def test_a_config_that_names_foreign_code_is_found(file: str, change: dict, named: str, out: Path) -> None:
    path = out / "hf" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (out / "hf" / checksums.CHECKSUMS_FILE).unlink()
    checksums.write_checksums(out / "hf")
    (fault,) = faults(out / "hf")
    says(fault, str(path), f"run {named},")


def test_a_checkpoint_with_other_tensors_is_found(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    (newest / "state.safetensors").write_bytes(save({"theta": torch.zeros(1)}))
    assert [newest.name in line for line in faults(run)] == [True]


def test_recovery_is_verified_with_its_history_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write_run(run, 10, finished=True)
    verdict = verify(run)
    assert (verdict.kind, verdict.faults) == ("recovery directory", [])
    assert verdict.checked == ["recipe.yaml", "training.json", "training.jsonl", "recovery.json"]
    folder = training_checkpoint_folder(run, 10)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    with TrainingHistory(run) as history:
        finish(TrainingCheckpoint(folder, 0.75, 20.0, history.flush()))
    assert verify(run).faults == []
    assert verify(folder).kind == "checkpoint of a recovery"
    monkeypatch.chdir(folder)
    assert (verify(Path()).kind, verify(Path()).faults) == ("checkpoint of a recovery", [])
    (folder / "model.safetensors").write_bytes(b"others")
    (run / "training.jsonl").write_text('{"step": 0}\n')
    (run / "training.json").write_text("{}")
    faults = "\n".join(verify(run).faults)
    says(faults, "training.json: damaged", "training.jsonl:1: damaged", "checkpoint-10", "model.safetensors")


def test_cached_predictions_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 2 * 8 * 4 * 4)  # two windows
    text = RecoveryText.of(torch.arange(40).view(5, 8), 1)
    key = CacheKey.of("dense", text, VOCABULARY, 4, 1.0)
    run = tmp_path / "run"
    write_run(run, 2)
    cached_teacher(run / "teacher", key, text, lambda: LiveTeacher(tiny_model("llama-gqa"), 4, 1.0), batch=2)
    assert (verify(run / "teacher").kind, verify(run / "teacher").faults) == ("cached predictions", [])
    assert "teacher" in verify(run).checked
    second, third = (teacher_shard(run / "teacher", index) for index in (1, 2))
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    third.unlink()
    assert verify(run).faults == verify(run / "teacher").faults
    says("\n".join(verify(run).faults), f"{second}: damaged", f"{third}: missing")
    write_record(
        run / "teacher" / TEACHER_RECORD, record_of(key, None)
    )  # of an unfinished cache, shards may be missing
    assert [str(second) in fault for fault in verify(run).faults] == [True]
    write_record(run / "teacher" / TEACHER_RECORD, {"version": 1})
    assert ["teacher.json: damaged" in fault for fault in verify(run).faults] == [True]


def test_run_of_a_recovery_is_no_run_of_a_search(tmp_path: Path, small) -> None:
    write_run(tmp_path / "run", 2)
    with refused(f"{tmp_path / 'run'}: holds a recovery"):
        export(tmp_path / "run", tmp_path / "out")
    with refused(f"{tmp_path / 'run'}: holds a recovery", "--out"):
        search(small(), tmp_path / "run")
