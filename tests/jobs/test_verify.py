"""verify: every artefact is whole as it is written, and every damage is one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model
from helpers.recipes import SMALL
from helpers.runs import finished_run
from safetensors.torch import load_file, save

from pgprune_cli.errors import UserError
from pgprune_cli.export import checksums as checksums
from pgprune_cli.export import gguf_checksum as gguf_checksum
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.verify import verify
from pgprune_cli.recipe.reader import find, load
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
)
from pgprune_cli.run.scores import Scores
from pgprune_cli.storage.records import write_record


def flip(path: Path, place: float = 0.7) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def faults(path: Path) -> list[str]:
    found = verify(path).faults
    assert not any("\n" in line for line in found)
    return list(found)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo with checkpoints, a repair and an evaluation."""
    run = tmp_path_factory.mktemp("searched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", str(run.parent / "cache"))
        search(load(find("demo"), [*SMALL, "search.checkpoint_every=2", "repair.method=bias"]), run)
    (run / EVALUATION_FILE).write_text("{}")
    (run / COSTS_FILE).write_text(json.dumps({"attention": [3, 4], "ffn": [1, 1]}))
    return run


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


PARTS = [RECIPE_FILE, SCORES_FILE, METRICS_FILE, COSTS_FILE, DECISION_RECORD, EVALUATION_FILE]


def test_a_run_is_whole(run: Path) -> None:
    verdict = verify(run)
    assert (verdict.kind, verdict.faults) == ("run directory", [])
    assert set(verdict.checked) == {*PARTS, "checkpoints"}
    assert verdict.text().startswith(f"{run}: whole, a run directory: ")


@pytest.mark.parametrize("part", [SCORES_FILE, DECISION_RECORD, DECISION_MASKS, REPAIR_FILE])
def test_parts_by_themselves_are_whole(part: str, run: Path) -> None:
    assert faults(run / part) == []


def test_a_checkpoint_by_itself(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    assert verify(newest).kind == verify(newest / "state.json").kind == "checkpoint"
    assert faults(newest) == []
    flip(newest / "state.safetensors")
    assert [line.startswith(f"{newest}: damaged checkpoint") for line in faults(newest)] == [True]


def test_a_run_that_is_not_finished_is_whole(run: Path) -> None:
    for part in (DECISION_RECORD, DECISION_MASKS, REPAIR_FILE, EVALUATION_FILE):
        (run / part).unlink()
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 7, "los')  # killed
    assert faults(run) == []


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("part", [*PARTS, DECISION_MASKS, REPAIR_FILE])
def test_damage_of_a_run_is_one_line_that_names_the_file(damage: Callable, part: str, run: Path) -> None:
    damage(run / part)
    found = faults(run)
    if part == RECIPE_FILE and damage is cut:  # a comment or a digit less is still a recipe
        return
    if part == METRICS_FILE:
        assert f"{run / METRICS_FILE}: " in found[0] and "it was cut" in found[0]
        return
    assert len(found) == 1, found
    assert str(run / part) in found[0]


@pytest.mark.parametrize("part", [DECISION_MASKS, REPAIR_FILE])
def test_a_flipped_bit_of_a_decision(part: str, run: Path) -> None:
    flip(run / part)
    assert [str(run / part) in line for line in faults(run)] == [True]


def test_every_damaged_checkpoint_is_named(run: Path) -> None:
    older, newest = sorted((run / "checkpoints").iterdir())
    flip(newest / "state.safetensors")
    assert len(faults(run)) == 1
    (older / "state.json").unlink()
    assert [older.name in faults(run)[0], newest.name in faults(run)[1]] == [True, True]


def test_scores_that_are_no_scores(run: Path) -> None:
    tensors = load_file(run / SCORES_FILE)
    about = Scores.load(run)
    Scores({**tensors, "layers.0.ffn": tensors["layers.0.ffn"] * float("nan")}, about.metric, about.fingerprint).save(
        run
    )
    assert faults(run) == [f"{run / SCORES_FILE}: layers.0.ffn holds NaN or infinity"]
    del tensors["layers.0.ffn"]
    Scores(tensors, about.metric, about.fingerprint).save(run)
    assert "the ffn of every layer" in faults(run / SCORES_FILE)[0]


def test_scores_of_another_model(run: Path) -> None:
    scores = Scores.load(run)
    Scores(scores.tensors, scores.metric, "0" * 64).save(run)
    assert faults(run) == [f"{run}: {SCORES_FILE} and {DECISION_RECORD} are of two models"]


def test_a_row_and_a_cost_that_are_none(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")  # which have a checksum of the rows
    rows = (run / METRICS_FILE).read_text().splitlines()
    (run / METRICS_FILE).write_text("\n".join([rows[0], " " * len(rows[1]), *rows[2:]]) + "\n")
    (run / COSTS_FILE).write_text('{"attention": [0], "ffn": [2]}')
    assert faults(run) == [
        f"{run / METRICS_FILE}:2: not a row of a search",
        f"{run / COSTS_FILE}: attention is no list of nanoseconds a unit",
    ]


@pytest.mark.parametrize("part", [COSTS_FILE, EVALUATION_FILE, MEASURED_FILE])
def test_another_digit_in_a_record(part: str, run: Path) -> None:
    write_record(run / part, {"attention": [3, 4], "ffn": [5, 6]})
    assert faults(run) == faults(run / part) == []
    (run / part).write_text((run / part).read_text().replace("6", "7", 1))
    assert faults(run) == faults(run / part) == [f"{run / part}: damaged: it is not what was written"]


def test_another_digit_in_the_history(run: Path) -> None:
    (run / METRICS_FILE).write_text((run / METRICS_FILE).read_text().replace('"step": 1,', '"step": 7,'))
    assert [line.startswith(f"{run / METRICS_FILE}: damaged: not what was written") for line in faults(run)] == [
        True
    ] * 2


def test_a_recipe_of_another_run(run: Path) -> None:
    (run / RECIPE_FILE).write_text((run / RECIPE_FILE).read_text().replace("seed: 0", "seed: 7"))
    assert faults(run) == [
        f"{run / DECISION_RECORD}: of another run than {RECIPE_FILE} beside it; put this run's own back"
    ]


def test_every_part_of_a_comparison_is_looked_at(tmp_path: Path) -> None:
    for path in (tmp_path / COMPARISON_RECORD, tmp_path / "dense" / MEASURED_FILE):
        write_record(path, {"seconds": 1})
    assert verify(tmp_path).checked == [COMPARISON_RECORD, "dense"]
    for path in (tmp_path / COMPARISON_RECORD, tmp_path / "dense" / MEASURED_FILE):
        path.write_text(path.read_text().replace("1", "2", 1))
        assert faults(path) == [f"{path}: damaged: it is not what was written"]
    assert len(faults(tmp_path)) == 2


def test_a_comparison_is_all_its_runs(run: Path, tmp_path: Path) -> None:
    shutil.move(run, tmp_path / "out" / "layers" / "seed-0")
    (tmp_path / "out" / COMPARISON_RECORD).write_text("{}")
    verdict = verify(tmp_path / "out")
    assert (verdict.kind, verdict.checked, verdict.faults) == ("comparison", [COMPARISON_RECORD, "layers/seed-0"], [])
    flip(tmp_path / "out" / "layers" / "seed-0" / DECISION_MASKS)
    assert len(faults(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["nothing", "folder", "model", "notes.txt", "other.gguf"])
def test_what_is_not_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "other.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(UserError, match=name):
        verify(tmp_path / name)


# --- exported models


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run exported in every format."""
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
def test_an_exported_model_is_whole(name: str, exported: Path) -> None:
    assert faults(exported / name) == []


def test_sha256sum_reads_the_list(out: Path) -> None:
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
def test_damage_of_a_gguf_file(place: float, out: Path) -> None:
    flip(out / "small.gguf", place)
    assert faults(out / "small.gguf")[0].startswith(f"{out / 'small.gguf'}: changed since the export")


def test_a_cut_gguf_file(out: Path) -> None:
    cut(out / "small.gguf")
    assert len(faults(out / "small.gguf")) == 1


def test_a_gguf_file_larger_than_a_piece(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_checksum, "BYTES_AT_A_TIME", 4096)
    assert faults(out / "small.gguf") == []


def test_the_card_is_for_people_to_edit(out: Path) -> None:
    (out / "hf" / checksums.MODEL_CARD).write_text("my own words")
    (out / "hf" / ".gitattributes").touch()
    assert faults(out / "hf") == []


def test_a_name_that_would_be_two_lines(out: Path) -> None:
    (out / "hf" / "a\n\x1b[2J.py").touch()
    assert faults(out / "hf") == [f"{out / 'hf'}/a\\n\\x1b[2J.py: code that pgprune did not put there"]


def test_a_list_that_is_none(out: Path) -> None:
    (out / "hf" / checksums.CHECKSUMS_FILE).write_text("0" * 64 + "  ../config.json\n")
    assert "damaged" in faults(out / "hf")[0]
    (out / "hf" / checksums.CHECKSUMS_FILE).unlink()
    assert "missing, so the files cannot be checked" in faults(out / "hf")[0]


# --- the code that travels


def test_code_is_held_to_more_than_the_list(out: Path) -> None:
    """Who changes the code can change the list, too."""
    path = out / "hf" / "modeling_pruned.py"
    path.write_text(path.read_text() + "\nimport os\n")
    (out / "hf" / "tokenization_x.py").touch()
    (out / "hf" / checksums.CHECKSUMS_FILE).unlink()
    checksums.write_checksums(out / "hf")
    assert faults(out / "hf") == [
        f"{path}: not the code that pgprune ships under this name. Export again.",
        f"{out / 'hf' / 'tokenization_x.py'}: code that pgprune did not write. Remove it.",
    ]


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"auto_map": {"AutoModel": "someone/repo--x.Y"}}, "someone/repo--x.py"),
        ("config.json", {"model_file": "../x.py"}, "../x.py"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "x.Y"]}}, "x.py"),
        ("tokenizer_config.json", {"auto_map": ["x.Y", None]}, "x.py"),
    ],
)
def test_configs_that_name_other_code(file: str, change: dict, named: str, out: Path) -> None:
    path = out / "hf" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (out / "hf" / checksums.CHECKSUMS_FILE).unlink()
    checksums.write_checksums(out / "hf")
    assert faults(out / "hf") == [f"{path}: tells runtimes to run {named}, which is not from pgprune. Export again."]


def test_checkpoints_of_another_kind(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    (newest / "state.safetensors").write_bytes(save({"theta": torch.zeros(1)}))
    assert [newest.name in line for line in faults(run)] == [True]
