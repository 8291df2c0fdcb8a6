"""doctor: what is fine, what is not, and what to do about it; against a hub that is made up."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from helpers.models import tiny_model
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from pgprune_cli.jobs import doctor as job
from pgprune_cli.jobs.doctor import Finding, doctor
from pgprune_cli.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.fix]


def test_a_machine_that_runs_these_tests_is_fine(small) -> None:
    findings = doctor(small())
    assert bad(findings) == []
    assert {finding.name for finding in findings} > {
        "python",
        "packages",
        "torch",
        "memory",
        "disk",
        "hub",
        "model",
        "data",
    }
    assert all(finding.text().startswith("ok ") for finding in findings)


def test_packages_that_are_absent_or_old(monkeypatch) -> None:
    wanted = ["torch>=999", "surely-nothing>=2", "typer>=0.1", "vllm>=1; extra == 'vllm'"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    finding = next(job._packages())
    version = metadata.version("torch")
    assert finding.found == f"torch {version}, needed >=999; surely-nothing is absent, needed >=2"
    assert finding.fix == "pip install pgprune"
    assert job._unmet("vllm")[0].startswith("vllm ")


def test_sources_that_are_not_installed(monkeypatch) -> None:
    def absent(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert [finding.fix for finding in job._packages()] == ["pip install -e ."]


def test_extras_are_nobodys_fault(monkeypatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["surely-nothing>=2; extra == 'vllm'", "typer>=0.1"])
    finding = job._extras()
    assert not finding.fix and "not: vllm (pip install 'pgprune[vllm]')" in finding.found
    assert "gguf" in finding.found.split("; not")[0] and "dev" not in finding.found


def test_a_full_disk_and_one_closed_to_us(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert {finding.fix.split(" on ")[0] for finding in job._disks()} == {"make room"}
    monkeypatch.setattr(job.os, "access", lambda *_: False)
    assert all("nothing can be written" in finding.fix for finding in job._disks())


def test_a_driver_without_a_cuda_build(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert ["built without CUDA" in finding.found for finding in bad(list(job._torch()))] == [True]


def test_too_little_memory(small, monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert [finding.name for finding in bad(doctor(small()))] == ["memory"]


def test_products_of_fp8(small, monkeypatch) -> None:
    (finding,) = (found for found in doctor(small("weight_format=fp8")) if found.name == "fp8")
    assert finding.fix == "" and finding.found == "multiplied on cpu"
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    (finding,) = bad(doctor(small("weight_format=fp8")))
    assert finding.fix.startswith("weight_format: fp8 needs a newer PyTorch")


@pytest.mark.parametrize(
    ("override", "name", "said"),
    [
        ("model=nowhere/at/all", "model", "no such directory"),
        ("model=base-without-weights", "model", "neither model.safetensors nor"),
        ("model=gpt", "model", "model type 'gpt2' is not supported"),
        ("device=cuda:77", "model", "CUDA devices"),
        ("weight_format=fp8 scores.metric=taylor", "model", "takes gradients, which fp8 weights have not"),
        ("calibration.corpus=nothing.txt", "data", "no such file"),
        ("calibration.corpus=empty.txt", "data", "holds no text"),
        ("calibration.corpus=wrong.jsonl", "data", "wrong.jsonl:1: not JSON"),
        ("evaluation.corpora=[tales=nothing.txt]", "data", "nothing.txt: no such file"),
        ("evaluation.corpora=[tales=wrong.jsonl]", "data", "wrong.jsonl:1: not JSON"),
    ],
)
def test_what_is_wrong_with_a_recipe(override: str, name: str, said: str, small) -> None:
    from transformers import GPT2Config

    Path("empty.txt").touch()
    Path("wrong.jsonl").write_text("{")
    tiny_model("llama-gqa").save_pretrained("base-without-weights")
    Path("base-without-weights/model.safetensors").unlink()
    GPT2Config().save_pretrained("gpt")
    Path("gpt/model.safetensors").touch()
    found = bad(doctor(small(*override.split())))
    assert [finding.name for finding in found] == [name]
    assert said in found[0].fix
    assert found[0].fails == (not override.startswith("evaluation."))


def test_a_text_under_another_name_is_looked_for_in_its_file(small) -> None:
    Path("tales.txt").write_text("The king was glad.")
    findings = doctor(small("evaluation.corpora=[wikitext2=tales.txt]"))
    assert bad(findings) == []
    assert Finding("data", "tales.txt, for evaluation, here") in findings


def test_a_model_is_counted_by_its_headers(small) -> None:
    model = tiny_model("llama-mha")
    model.save_pretrained("base")
    found = doctor(small("model=base", "dtype=bfloat16"))
    assert bad(found) == []
    weights = job._of_source(job._local("base"))
    assert weights.parameters == model.num_parameters()
    Path("base/model.safetensors").write_bytes(Path("base/model.safetensors").read_bytes()[:-1])
    assert "damaged" in bad(doctor(small("model=base")))[0].fix


# --- the hub


def on_hub(small) -> Recipe:
    return small("model=someone/model", "calibration.corpus=c4")


def answers(monkeypatch, error: Exception | None = None, files: int = 1) -> None:
    """A hub that has everything, or answers every question with an error."""

    class Api:
        def auth_check(self, name):
            if error:
                raise error

        def model_info(self, name, files_metadata, timeout):
            sibling = SimpleNamespace(rfilename="model.safetensors", size=2_000_000)
            return SimpleNamespace(siblings=[sibling] * files, safetensors=SimpleNamespace(total=1_000_000))

        def dataset_info(self, name, timeout):
            if error:
                raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


def test_what_the_hub_has(small, monkeypatch) -> None:
    answers(monkeypatch)
    findings = doctor(on_hub(small))
    assert bad(findings) == []
    assert Finding("model", "someone/model, 1 million parameters, on the hub, 0.0 GB to download") in findings


def test_a_repository_of_pickles(small, monkeypatch) -> None:
    answers(monkeypatch, files=0)
    assert "convert_to_safetensors" in bad(doctor(on_hub(small)))[0].fix


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (GatedRepoError, "ask for access on https://huggingface.co/"),
        (RepositoryNotFoundError, "no such repository"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it, or "),
        (TimeoutError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_has_not(kind, said: str, small, monkeypatch) -> None:
    answers(monkeypatch, kind.__new__(kind))
    found = bad(doctor(on_hub(small)))
    assert [finding.name for finding in found] == ["model", "data"]
    assert all(said in finding.fix for finding in found)


@pytest.mark.parametrize("kind", [OfflineModeIsEnabled, TimeoutError])
def test_an_evaluations_text_that_is_out_of_reach_stops_no_search(kind, small, monkeypatch) -> None:
    answers(monkeypatch, kind.__new__(kind))
    (found,) = bad(doctor(small("evaluation.corpora=[wikitext2]")))
    assert not found.fails
    assert found.text().startswith("note data      wikitext2, for evaluation\n")
    assert found.fix.endswith("or evaluation.corpora: [wikitext2=FILE]; only eval and compare read it")
    (found,) = bad(doctor(small("calibration.corpus=c4")))
    assert found.fails and found.text().startswith("MEND ")
    assert found.fix.endswith("or calibration.corpus: FILE")


def test_what_is_in_the_cache_needs_no_hub(small, monkeypatch) -> None:
    tiny_model("llama-gqa").save_pretrained("cached")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: str(Path("cached/config.json").absolute())
    )
    assert bad(doctor(small("model=someone/model"))) == []
