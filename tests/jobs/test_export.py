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
from helpers.messages import refused, says
from helpers.runs import finished_run
from safetensors import safe_open

from pgprune_cli.cli import export as verb
from pgprune_cli.cli.program import main
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
    """Return a function that runs the program in this process and returns exit code, stdout and stderr."""

    def program(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgprune", *arguments])
        with pytest.raises(SystemExit) as exit_of:
            main()
        out, err = capsys.readouterr()
        return int(exit_of.value.code or 0), out, err

    return program


def test_options_of_reads_the_command_line():
    options = job.options_of(
        "hf", dtype="bfloat16", shard_size="1.5GB", pad_empty_attention=True, pad_kv_heads=2, pad_ffn=64
    )
    assert options.requirements == ShapeRequirements("every", "any", 2, 64)
    assert (options.dtype, options.shard_size) == ("bfloat16", 1_500_000_000)
    assert job.options_of("mlx", shard_size="500mb").requirements == ShapeRequirements()
    assert job.options_of("gguf", dtype="q8_0") == Options(ShapeRequirements(), "q8_0")


@pytest.mark.parametrize(
    ("format", "dtype", "supported"),
    [
        ("hf", "q8_0", "float32, float16, bfloat16"),
        ("mlx", "q8_0", "float32, float16, bfloat16"),
        ("gguf", "int8", "float32, float16, bfloat16, q8_0"),
    ],
)
def test_a_dtype_that_the_format_does_not_support_is_refused(format, dtype, supported):
    with refused(f"--dtype {dtype}", f"--format {format}", supported):
        job.options_of(format, dtype=dtype)


def test_a_shard_size_is_refused_for_a_single_file():
    with refused("--shard-size 1GB", "--format gguf"):
        job.options_of("gguf", shard_size="1GB")


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5TB"])
def test_a_shard_size_that_is_not_a_size_is_refused(size):
    with refused(f"--shard-size {size}", "500MB"):
        job.options_of("hf", shard_size=size)


def test_the_table_has_the_formats_of_the_command_line():
    assert get_args(verb.Format) == tuple(job.FORMATS)


def test_target_is_out_or_below_models():
    assert job.target(Path("runs/tiny"), None, "hf") == Path("models/tiny")
    assert job.target(Path("runs/tiny"), None, "gguf") == Path("models/tiny.gguf")
    assert job.target(Path("runs/tiny"), Path("x"), "mlx") == Path("x")
    with refused("--out x", "--format gguf", ".gguf"):
        job.target(Path("runs/tiny"), Path("x"), "gguf")
    with refused("--out x.gguf", "--format mlx", "--format gguf"):
        job.target(Path("runs/tiny"), Path("x.gguf"), "mlx")


def planned_and_written(pgprune, run: Path, options: list[str]) -> tuple[dict, list[dict]]:
    """Return what a dry run prints, and its tensors. Fails unless the export prints the same (options have --json)."""
    code, out, err = pgprune("export", str(run), "--dry-run", *options)
    assert (code, err) == (0, "")
    assert not Path("models").exists()
    planned = json.loads(out)
    tensors = planned.pop("tensors")
    code, out, _ = pgprune("export", str(run), *options)
    assert code == 0
    assert json.loads(out) == planned
    return planned, tensors


def test_a_dry_run_writes_nothing_and_prints_what_an_export_writes(run, pgprune):
    options = ["--dtype", "bfloat16", "--shard-size", "9KB", "--pad-ffn", "8", "--json"]
    planned, tensors = planned_and_written(pgprune, run, options)
    assert planned["model"] == "models/tiny"
    stored = []
    for path in sorted(Path("models/tiny").glob("model-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                stored.append([name, list(tensor.shape), "bfloat16", tensor.nbytes, path.name])
    assert sorted(stored) == sorted(list(row.values()) for row in tensors)
    assert planned["parameters_after"] == sum(row["bytes"] for row in tensors) // 2
    assert planned["bytes"] == sum(path.stat().st_size for path in Path("models/tiny").glob("model-*.safetensors"))


def test_a_dry_run_prints_what_a_gguf_export_writes(run, pgprune):
    gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")
    options = ["--format", "gguf", "--dtype", "float16", "--pad-kv-heads", "2", "--json"]
    planned, tensors = planned_and_written(pgprune, run, options)
    assert planned["bytes"] == Path("models/tiny.gguf").stat().st_size
    stored = gguf.GGUFReader("models/tiny.gguf").tensors
    dtypes = {"F16": "float16", "F32": "float32"}
    assert tensors == [
        {
            "name": tensor.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "dtype": dtypes[tensor.tensor_type.name],
            "bytes": int(tensor.n_bytes),
            "file": "tiny.gguf",
        }
        for tensor in stored
    ]


def test_a_dry_run_without_json_prints_a_table_of_shapes(run, pgprune):
    code, out, _ = pgprune("export", str(run), "--dry-run")
    assert code == 0
    assert "48 × 32" in out  # layer 1's queries: 3 KV heads with 2 query heads of 8 each
    assert out.splitlines()[-1].startswith("would write models/tiny: ")


def test_a_failed_push_is_reported_in_one_line_and_the_directory_is_kept(run, pgprune, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = pgprune("export", str(run), "--push", "me/tiny", "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("pgprune: --push me/tiny: upload failed") and err.count("\n") == 1
    assert Path("models/tiny/model.safetensors").exists()


def test_a_push_to_an_invalid_name_is_refused_before_writing(run, pgprune):
    code, _, err = pgprune("export", str(run), "--push", "a/b/c", "--quiet")
    assert code == 2
    assert "--push a/b/c: not a valid name on the hub" in err
    assert not Path("models").exists()


def test_a_repair_is_read_on_every_access(run):
    """Nothing is held in memory, which all outputs together could fill."""
    decision = Decision.load(run)
    with safe_open(run / REPAIR_FILE, framework="pt") as file:
        names = {name for name in file.keys() if name.endswith("weight")}  # noqa: SIM118
    assert {f"layers.{index}.{block}.weight" for index, block in decision.repaired} == names
    assert len(decision.repaired) == len(names)
    first = decision.repaired[1, "ffn"]
    assert first.weight is not decision.repaired[1, "ffn"].weight
    assert first.bias is None
    with pytest.raises(KeyError):
        decision.repaired[9, "ffn"]


def test_an_exported_model_is_exported_again(run, pgprune):
    job.export(run, Path("once"))
    code, _, err = pgprune("export", "once", "--out", "twice", "-q")
    assert code == 0, err
    for name in ("config.json", "model.safetensors", "decision.json", "decision.safetensors"):
        assert Path("once", name).read_bytes() == Path("twice", name).read_bytes(), name


def test_an_exported_model_that_changed_is_not_exported_again(run, pgprune):
    job.export(run, Path("once"))
    weights = Path("once", "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = pgprune("export", "once", "--format", "gguf", "--out", "twice.gguf", "-q")
    assert code == 2 and not Path("twice.gguf").exists()
    says(err, "once/model.safetensors", "changed since the export")


def test_an_exported_model_has_no_other_base(run, pgprune):
    job.export(run, Path("once"))
    code, _, err = pgprune("export", "once", "--out", "twice", "--model", "demo", "-q")
    assert code == 2
    says(err, "--model demo", "once", "exported model")


@pytest.mark.parametrize(("format", "out"), [("hf", "there"), ("mlx", "there"), ("gguf", "there.gguf")])
def test_an_existing_target_is_refused_before_planning(format, out, run, pgprune, monkeypatch):
    monkeypatch.setattr(job, "plan", lambda *_: pytest.fail("planned"))
    if format != "gguf":
        Path(out).mkdir()
    Path(out, "file" if format != "gguf" else "").touch()
    code, _, err = pgprune("export", str(run), "--format", format, "--out", out)
    assert code == 2
    assert err.startswith(f"pgprune: {out}: already exists")
    assert err.count("\n") == 1


def test_a_dry_run_may_name_an_existing_target(run, pgprune):
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
def test_a_signal_leaves_no_partial_export(format, signum, code, said, run, pgprune, monkeypatch):
    before, handlers = (
        sorted(Path().iterdir()),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    )

    def tensors(*_: object):
        os.kill(os.getpid(), signum)
        yield torch.zeros(1)

    monkeypatch.setattr("pgprune_cli.export.plan.Plan.tensors", tensors)
    words = ["export", str(run), "--format", format, "--out", f"out.{format}", "-q"]
    again = f"nothing is written to out.{format}. Resume with: pgprune {' '.join(words)}"
    assert pgprune(*words) == (code, "", f"pgprune: {said}\npgprune: stopped: {again}\n")
    assert sorted(Path().iterdir()) == before
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_disk_that_fills_up_is_named_by_what_was_asked_for(format, run, pgprune, monkeypatch):
    def tensors(*_: object):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pgprune_cli.export.plan.Plan.tensors", tensors)
    code, _, err = pgprune("export", str(run), "--format", format, "--out", f"new.{format}", "-q")
    assert code == 1
    room = "No space left on device. Make room, then run the same command again."
    assert err == f"pgprune: {Path('new').resolve()}.{format}: {room}\n"


def test_the_card_says_how_mlx_loads_it_where_it_can(run):
    for format in ("hf", "mlx"):
        job.export(run, Path(format), format=format)
        assert ("mlx_lm" in Path(format, "README.md").read_text()) == (format == "mlx")
