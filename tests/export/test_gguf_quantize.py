"""K-quants: llama.cpp's quantizer turns the full-precision file into the final one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import llamacpp
from helpers.exports import decide
from helpers.messages import refused
from helpers.models import TEXT, VOCABULARY, save_tokenizer, tiny_config

from pgprune_cli.errors import RunError
from pgprune_cli.export import gguf as writer
from pgprune_cli.export import gguf_quantize
from pgprune_cli.export.plan import Options
from pgprune_cli.jobs import export as job
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import resolve

gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

COPY = """
import ctypes
import shutil

class llama_model_quantize_default_params(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int)]

def llama_model_quantize(source, out, parameters):
    shutil.copyfile(source, out)
    return 0
"""
"""A quantizer that quantizes nothing."""

FAIL = COPY.replace("return 0", "print('llama_model_quantize: failed to quantize: a reason', flush=True)\n    return 1")


def plan(tmp_path: Path, dtype: str, channels: int = 300) -> writer.FilePlan:
    """Return the plan of a tiny pruned model with rows of 256 weights, but for the FFN's outputs."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    if not base.exists():
        config = tiny_config("llama-mha")
        config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
        save_tokenizer(base)
    kept = LayerMask(torch.ones(4, dtype=torch.bool), torch.arange(512) < channels)
    decision = decide(base, (kept,) * 4)
    return writer.plan(resolve(str(base)), decision, Options(dtype=dtype))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a quantizer made of the given code."""

    def install(code: str) -> None:
        folder = tmp_path / "library"
        folder.mkdir()
        (folder / "llama_cpp.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return install


def test_k_quants_without_the_quantizer_are_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("--dtype q4_k_m", "quantizer", "pip install 'pgprune[k-quants]'"):
        plan(tmp_path, "q4_k_m")


def test_the_file_gets_its_checksum_after_it_was_quantized(tmp_path, install):
    install(COPY)
    planned, reported = plan(tmp_path, "q5_k_m"), []
    planned.write(tmp_path / "new" / "out.gguf", reported.append)
    verdict = verify(tmp_path / "new" / "out.gguf")
    assert (verdict.kind, verdict.faults) == ("GGUF file", [])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.gguf"]
    assert sum(reported) >= planned.bytes


def test_a_quantizer_that_fails_leaves_nothing_behind(tmp_path, install):
    install(FAIL)
    planned = plan(tmp_path, "q2_k")
    with refused("--dtype q2_k", "a reason", "exit code 1", "--dtype q8_0", error=RunError):
        planned.write(tmp_path / "new" / "out.gguf", lambda _: None)
    assert not list((tmp_path / "new").iterdir())


def test_matrices_that_fall_back_are_counted_and_their_types_expected(tmp_path, install):
    install(COPY)
    planned = plan(tmp_path, "q4_k_m")
    types = {edit.name: planned.stored(edit)[0] for edit in planned.edits}
    assert types["token_embd.weight"] == types["output.weight"] == "q6_k"
    assert types["blk.0.attn_q.weight"] == "q4_k" and types["blk.0.attn_norm.weight"] == "float32"
    assert types["blk.0.ffn_down.weight"] == "q5_0", "rows of 320 weights"
    (note,) = planned.notes
    assert "4 of 30 matrices" in note and "For 4 of them, budget.ffn_multiple: 256" in note and "--pad-ffn 256" in note
    assert plan(tmp_path, "q4_k_m", channels=256).notes == []
    summary = job.summary(planned, tmp_path / "out.gguf")
    assert summary["estimated"] and summary["bytes"] == planned.bytes and summary["notes"] == [note]


@pytest.mark.parametrize("dtype", gguf_quantize.K_QUANTS)
def test_llama_cpp_quantizes_and_runs_the_file(dtype, tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("no quantizer: pip install 'pgprune[k-quants]'")
    llamacpp.require()
    planned, out = plan(tmp_path, dtype), tmp_path / "out.gguf"
    planned.write(out, lambda _: None)
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    expected = {edit.name: planned.stored(edit)[0] for edit in planned.edits}
    matrices = {name: kind for name, kind in types.items() if kind != "f32"}
    assert matrices.keys() == {name for name, kind in expected.items() if kind != "float32"}
    assert types["blk.0.attn_q.weight"] == expected["blk.0.attn_q.weight"]
    assert verify(out).faults == []
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
    assert reader.fields["pgprune.kept.ffn_channels"].contents() == [300] * 4
    assert abs(out.stat().st_size / planned.bytes - 1) < 0.2
    summary = job.summary(planned, out, written=True)
    assert (summary["bytes"], summary["estimated"]) == (out.stat().st_size, False)
    planned_float = plan(tmp_path, "float32")
    planned_float.write(tmp_path / "exact.gguf", lambda _: None)
    (_, exact), (_, quantized) = llamacpp.generate([tmp_path / "exact.gguf", out], TEXT[:6], 1, VOCABULARY, 5)
    assert (exact - quantized).abs().max() < 0.5
