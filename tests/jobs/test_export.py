"""The export job and its verb: what is planned is what is written."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.runs import finished_run
from safetensors import safe_open

from pgprune_cli.cli import export as verb
from pgprune_cli.cli.program import main
from pgprune_cli.errors import UserError
from pgprune_cli.export.plan import Options
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.jobs import export as job
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import REPAIR_FILE


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished run on a tiny Llama, with a repair."""
    monkeypatch.chdir(tmp_path)
    finished_run(Path("runs/tiny"))
    return Path("runs/tiny")


@pytest.fixture
def pgprune(monkeypatch, capsys):
    """Runs the program in this process: (exit code, stdout, stderr)."""

    def program(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgprune", *arguments])
        with pytest.raises(SystemExit) as exit_of:
            main()
        out, err = capsys.readouterr()
        return int(exit_of.value.code or 0), out, err

    return program


def test_options_are_what_the_command_line_says():
    options = job.options_of("hf", "bfloat16", "1.5GB", True, 2, 64)
    assert options.requirements == ShapeRequirements("every", "any", 2, 64)
    assert (options.dtype, options.shard_size) == ("bfloat16", 1_500_000_000)
    assert job.options_of("mlx", None, "500mb", False, 1, 1).requirements == ShapeRequirements()
    assert job.options_of("gguf", "q8_0", None, False, 1, 1) == Options(ShapeRequirements(), "q8_0")
    for format in ("hf", "mlx"):
        with pytest.raises(
            UserError, match=f"--dtype q8_0: expected float32, float16, bfloat16 with --format {format}"
        ):
            job.options_of(format, "q8_0", None, False, 1, 1)
    with pytest.raises(UserError, match="--dtype int8: expected float32, float16, bfloat16, q8_0 with --format gguf"):
        job.options_of("gguf", "int8", None, False, 1, 1)
    with pytest.raises(UserError, match="--shard-size 1GB: an export with --format gguf is one file"):
        job.options_of("gguf", None, "1GB", False, 1, 1)
    for size in ("5", "GB", "0GB", "-1GB", "5TB"):
        with pytest.raises(UserError, match=f"--shard-size {size}: expected a size such as 500MB or 5GB"):
            job.options_of("hf", None, size, False, 1, 1)


def test_the_table_has_the_formats_of_the_command_line():
    assert get_args(verb.Format) == tuple(job.FORMATS)


def test_where_an_export_goes():
    assert job.target(Path("runs/tiny"), None, "hf") == Path("models/tiny")
    assert job.target(Path("runs/tiny"), None, "gguf") == Path("models/tiny.gguf")
    assert job.target(Path("runs/tiny"), Path("x"), "mlx") == Path("x")
    with pytest.raises(UserError, match=r"--out x: --format gguf writes one file, whose name should end in \.gguf"):
        job.target(Path("runs/tiny"), Path("x"), "gguf")


def planned_and_written(pgprune, run: Path, options: list[str]) -> tuple[dict, list[dict]]:
    """What a dry run with `options`, `--json` among them, says, and its tensors; the export then says the same."""
    code, out, err = pgprune("export", str(run), "--dry-run", *options)
    assert (code, err) == (0, "")
    assert not Path("models").exists()
    planned = json.loads(out)
    tensors = planned.pop("tensors")
    code, out, _ = pgprune("export", str(run), *options)
    assert code == 0
    assert json.loads(out) == planned
    return planned, tensors


def test_a_dry_run_writes_nothing_and_tells_what_an_export_writes(run, pgprune):
    options = ["--dtype", "bfloat16", "--shard-size", "9KB", "--pad-ffn", "8", "--json"]
    planned, tensors = planned_and_written(pgprune, run, options)
    assert planned["model"] == "models/tiny"
    found = []
    for path in sorted(Path("models/tiny").glob("model-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found.append([name, list(tensor.shape), "bfloat16", tensor.nbytes, path.name])
    assert sorted(found) == sorted(list(row.values()) for row in tensors)
    assert planned["parameters_after"] == sum(row["bytes"] for row in tensors) // 2
    assert planned["bytes"] == sum(path.stat().st_size for path in Path("models/tiny").glob("model-*.safetensors"))


def test_a_gguf_file_is_planned_too(run, pgprune):
    gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")
    options = ["--format", "gguf", "--dtype", "float16", "--pad-kv-heads", "2", "--json"]
    planned, tensors = planned_and_written(pgprune, run, options)
    assert planned["bytes"] == Path("models/tiny.gguf").stat().st_size
    found = gguf.GGUFReader("models/tiny.gguf").tensors
    words = {"F16": "float16", "F32": "float32"}
    assert tensors == [
        {
            "name": tensor.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "dtype": words[tensor.tensor_type.name],
            "bytes": int(tensor.n_bytes),
            "file": "tiny.gguf",
        }
        for tensor in found
    ]


def test_a_person_reads_a_table_of_shapes(run, pgprune):
    code, out, _ = pgprune("export", str(run), "--dry-run")
    assert code == 0
    assert "48 × 32" in out  # layer 1's queries: 3 groups of 2 heads of 8
    assert out.splitlines()[-1].startswith("would write models/tiny: ")


def test_a_push_that_fails_is_one_line_and_the_directory_stays(run, pgprune, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = pgprune("export", str(run), "--push", "me/tiny", "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("pgprune: --push me/tiny: upload failed") and err.count("\n") == 1
    assert Path("models/tiny/model.safetensors").exists()


def test_a_push_to_no_name_is_refused_before_anything_is_written(run, pgprune):
    code, _, err = pgprune("export", str(run), "--push", "a/b/c", "--quiet")
    assert code == 2
    assert "--push a/b/c: not a valid name on the hub" in err
    assert not Path("models").exists()


def test_a_repair_is_read_as_it_is_needed(run):
    """Every access reads anew and nothing is held: all together could fill the memory."""
    decision = Decision.load(run)
    with safe_open(run / REPAIR_FILE, framework="pt") as file:
        names = {name for name in file.keys() if name.endswith("weight")}  # noqa: SIM118
    assert {f"layers.{index}.{block}.weight" for index, block in decision.outputs} == names
    assert len(decision.outputs) == len(names)
    first = decision.outputs[1, "ffn"]
    assert first.weight is not decision.outputs[1, "ffn"].weight
    assert first.bias is None
    with pytest.raises(KeyError):
        decision.outputs[9, "ffn"]


def test_an_exported_model_is_no_run(run, pgprune):
    job.export(run, Path("once"))
    code, _, err = pgprune("export", "once", "--out", "twice", "-q")
    assert (code, err) == (2, "pgprune: once: an exported model; export the run directory that it was made from\n")


@pytest.mark.parametrize(("format", "out"), [("hf", "there"), ("mlx", "there"), ("gguf", "there.gguf")])
def test_what_is_there_already_is_refused_before_anything_is_planned(format, out, run, pgprune, monkeypatch):
    monkeypatch.setattr(job, "plan", lambda *_: pytest.fail("planned"))
    if format != "gguf":
        Path(out).mkdir()
    Path(out, "file" if format != "gguf" else "").touch()
    code, _, err = pgprune("export", str(run), "--format", format, "--out", out)
    assert code == 2
    assert err.startswith(f"pgprune: {out}: exists already")
    assert err.count("\n") == 1


def test_a_dry_run_may_name_what_is_there_already(run, pgprune):
    Path("there").mkdir()
    Path("there", "file").touch()
    code, out, err = pgprune("export", str(run), "--out", "there", "--dry-run")
    assert (code, err) == (0, "")
    assert "would write there: " in out
    assert [path.name for path in Path("there").iterdir()] == ["file"]


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("signum", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing_half_written(format, signum, code, said, run, pgprune, monkeypatch):
    before, handlers = (
        sorted(Path().iterdir()),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    )

    def tensors(*_: object):
        os.kill(os.getpid(), signum)
        yield torch.zeros(1)

    monkeypatch.setattr("pgprune_cli.export.plan.Plan.tensors", tensors)
    words = ["export", str(run), "--format", format, "--out", f"out.{format}", "-q"]
    again = f"nothing is written to out.{format}; to go on: pgprune {' '.join(words)}"
    assert pgprune(*words) == (code, "", f"pgprune: {said}\npgprune: stopped; {again}\n")
    assert sorted(Path().iterdir()) == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_disk_that_fills_up_is_named_by_what_was_asked_for(format, run, pgprune, monkeypatch):
    def tensors(*_: object):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pgprune_cli.export.plan.Plan.tensors", tensors)
    code, _, err = pgprune("export", str(run), "--format", format, "--out", f"new.{format}", "-q")
    assert code == 1
    room = "No space left on device; make room, then run the same command again"
    assert err == f"pgprune: {Path('new').resolve()}.{format}: {room}\n"


def test_the_card_says_how_mlx_loads_it_where_it_can(run):
    for format in ("hf", "mlx"):
        job.export(run, Path(format), format=format)
        assert ("mlx_lm" in Path(format, "README.md").read_text()) == (format == "mlx")
