"""doctor: each check passes on this machine, and fails with a fix when something is missing. The hub is simulated."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import datasets  # noqa: F401  (before the hub is simulated)
import huggingface_hub
import psutil
import pytest
import torch
from helpers.fp8 import multiplies_fp8_on_cpu
from helpers.messages import says
from helpers.models import save_tokenizer, tiny_model
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from pgprune_cli.console.progress import StderrProgress
from pgprune_cli.jobs import machine
from pgprune_cli.jobs.doctor import doctor
from pgprune_cli.jobs.machine import Finding
from pgprune_cli.model.devices import unusable_gpu
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search.preparation import Preparation


@pytest.fixture(autouse=True)
def _work_in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status != "OK"]


def test_this_machine_passes_every_check(small) -> None:
    findings = doctor(small())
    assert problems(findings) == []
    assert {finding.name for finding in findings} > {
        "python",
        "packages",
        "torch",
        "memory",
        "disk",
        "hub",
        "device",
        "model",
        "windows",
        "budget",
        "weights",
        "tokenizer",
        "text",
    }
    assert all(finding.text().startswith("OK ") and not finding.fails for finding in findings)


def test_missing_and_old_packages_are_failures(monkeypatch) -> None:
    requirements = ["torch>=999", "surely-nothing>=2", "typer>=0.1", "vllm>=1; extra == 'vllm'"]
    monkeypatch.setattr(metadata, "requires", lambda _: requirements)
    finding = next(machine._packages())
    assert finding.status == "FAIL"
    version = metadata.version("torch")
    for fact in (f"torch {version}", ">=999", "surely-nothing is not installed", ">=2", "pip install pgprune"):
        assert fact in finding.text()
    assert "typer" not in finding.text() and "vllm" not in finding.text()
    assert machine._unmet_requirements("vllm")[0].startswith("vllm ")


def test_a_source_tree_without_installation_is_a_failure(monkeypatch) -> None:
    def not_installed(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    (finding,) = machine._packages()
    assert finding.status == "FAIL"
    says(finding.text(), "pip install -e .")


def test_missing_extras_are_listed_but_no_failure(monkeypatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["surely-nothing>=2; extra == 'vllm'", "typer>=0.1"])
    finding = machine._extras()
    installed, _, missing = finding.state.partition("; not installed: ")
    assert finding.status == "OK"
    assert "gguf" in installed and "dev" not in installed
    assert missing == "vllm (pip install 'pgprune[vllm]')"


@pytest.mark.parametrize(("free", "writable", "fact"), [(10, True, "Make room"), (10**12, False, "not writable")])
def test_a_bad_disk_is_a_failure_only_if_the_search_needs_it(free, writable, fact, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(machine.os, "access", lambda *_: writable)
    for downloads, expected in ((False, ["FAIL", "WARN", "WARN"]), (True, ["FAIL", "FAIL", "WARN"])):
        findings = list(machine._disks(Path("runs"), downloads))
        assert [finding.status for finding in findings] == expected
        assert all(fact in finding.fix for finding in findings)


def disks(findings: Sequence[Finding]) -> dict[str, Finding]:
    """Return the findings about disks by what is on them."""
    found = [finding for finding in findings if finding.name == "disk"]
    return {finding.state.partition(" free for ")[2].partition(" (")[0]: finding for finding in found}


def test_the_disk_of_the_run_directory_is_checked(small, monkeypatch, tmp_path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 if path == full else 10**12))
    assert problems(disks(doctor()).values()) == []
    assert disks(doctor(small(), full / "run"))["runs"].fails
    monkeypatch.setenv("PGPRUNE_RUNS", str(full / "runs"))
    assert disks(doctor())["runs"].fails


def test_a_full_hub_cache_is_a_failure_only_for_a_model_that_is_not_here(small, monkeypatch) -> None:
    simulate_hub(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert disks(doctor(small()))["the hub cache"].status == "WARN"
    assert disks(doctor(hub_recipe(small)))["the hub cache"].fails


def test_a_torch_that_cannot_be_imported_is_a_finding() -> None:
    """In a process of its own, because this one has imported torch."""
    code = "import sys\nsys.modules['torch'] = None\nfrom pgprune_cli.cli.program import main\nmain()"
    for arguments in (["doctor"], ["doctor", "demo"]):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (1, "")
        assert (
            "FAIL torch     cannot be imported" in ended.stdout
            and "pip install --force-reinstall torch" in ended.stdout
        )
        assert "OK   hub" in ended.stdout and "text" not in ended.stdout.split()


@pytest.mark.parametrize(("cuda", "fact"), [(None, "built without CUDA"), ("13.0", "too old")])
def test_a_gpu_that_torch_cannot_use_is_a_warning_and_the_search_says_so(
    cuda, fact, small, monkeypatch, tmp_path, capfd
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    (finding,) = (finding for finding in machine._torch() if finding.status != "OK")
    assert finding.status == "WARN" and fact in finding.state and "pytorch.org" in finding.fix
    assert Preparation(small("device=auto"), progress=StderrProgress()).devices == [torch.device("cpu")]
    printed = capfd.readouterr().err
    assert all(part in printed for part in ("WARN", fact, "the CPU computes"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unusable_gpu() is None


def test_too_little_memory_is_a_failure(small, monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert [finding.name for finding in problems(doctor(small()))] == ["memory"]


def test_missing_fp8_products_are_a_failure(small, monkeypatch) -> None:
    (finding,) = (finding for finding in doctor(small("weight_format=fp8")) if finding.name == "format")
    assert finding.status == ("OK" if multiplies_fp8_on_cpu() else "FAIL")
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    (finding,) = problems(doctor(small("weight_format=fp8")))
    assert "weight_format" in finding.fix and "PyTorch" in finding.fix


@pytest.mark.parametrize(
    ("override", "name", "facts"),
    [
        ("evaluation.corpora=[tales=nothing.txt]", "text", ["nothing.txt", "Only eval and compare"]),
        ("evaluation.corpora=[tales=wrong.jsonl]", "text", ["wrong.jsonl:1"]),
        ("evaluation.corpora=[tales=empty.txt]", "text", ["empty.txt", "no text"]),
    ],
)
def test_an_evaluation_text_that_cannot_be_read_is_a_warning(override: str, name: str, facts: list[str], small) -> None:
    Path("empty.txt").touch()
    Path("wrong.jsonl").write_text("{")
    (finding,) = problems(doctor(small(override)))
    assert (finding.name, finding.status) == (name, "WARN")
    says(finding.fix, *facts)


def test_a_corpus_with_a_file_of_its_own_is_read_from_the_file(small) -> None:
    Path("tales.txt").write_text("The king was glad.")
    findings = doctor(small("evaluation.corpora=[wikitext2=tales.txt]"))
    assert problems(findings) == []
    assert Finding("text", "OK", "tales.txt, for evaluation, on this machine") in findings


def test_parameters_are_counted_from_the_file_headers_and_damage_is_a_failure(small) -> None:
    model = tiny_model("llama-mha")
    model.save_pretrained("base")
    save_tokenizer(Path("base"))
    Path("text.txt").write_text("The king was glad. " * 60)
    recipe = small("model=base", "calibration.corpus=text.txt", "evaluation.seqlen=[16]")
    findings = doctor(recipe)
    assert problems(findings) == []
    (weights,) = (finding for finding in findings if finding.name == "weights")
    assert f"{model.num_parameters() / 1e6:.1f} million parameters" in weights.state
    Path("base/model.safetensors").write_bytes(Path("base/model.safetensors").read_bytes()[:-1])
    assert "damaged" in problems(doctor(recipe))[0].fix


# --- the hub


def hub_recipe(small) -> Recipe:
    return small("model=someone/model", "calibration.corpus=c4")


def simulate_hub(monkeypatch, error: Exception | None = None, files: Sequence[str] = ("model.safetensors",)) -> None:
    """Simulate a hub that has everything, or that answers every request with an error."""

    class Api:
        def auth_check(self, name):
            if error:
                raise error

        def model_info(self, name, files_metadata, timeout):
            siblings = [SimpleNamespace(rfilename=file, size=2_000_000) for file in files]
            return SimpleNamespace(siblings=siblings, safetensors=SimpleNamespace(total=1_000_000))

        def dataset_info(self, name, timeout):
            if error:
                raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)


def test_a_model_and_a_data_set_on_the_hub_are_ok(small, monkeypatch) -> None:
    simulate_hub(monkeypatch)
    findings = doctor(hub_recipe(small))
    assert problems(findings) == []
    (model,) = (finding for finding in findings if finding.name == "model")
    assert model.state.startswith("someone/model, 1 million parameters, 0.0 GB to download from the hub")
    assert Finding("text", "OK", "c4, for calibration, on the hub") in findings


def test_a_repository_without_safetensors_is_a_failure(small, monkeypatch) -> None:
    simulate_hub(monkeypatch, files=["config.json", "pytorch_model.bin"])
    assert "pgprune convert" in problems(doctor(hub_recipe(small)))[0].fix


def test_a_repository_with_gguf_files_is_a_failure(small, monkeypatch) -> None:
    simulate_hub(monkeypatch, files=["config.json", "x-Q4_K_M.gguf"])
    says(problems(doctor(hub_recipe(small)))[0].fix, "GGUF", "hf download someone/model")


def test_a_repository_with_an_adapter_alone_is_a_failure(small, monkeypatch) -> None:
    simulate_hub(monkeypatch, files=["adapter_config.json", "adapter_model.safetensors"])
    says(problems(doctor(hub_recipe(small)))[0].fix, "holds an adapter", "merge_and_unload")


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (GatedRepoError, "https://huggingface.co/"),
        (RepositoryNotFoundError, "no such repository"),
        (TimeoutError, "cannot be reached"),
    ],
)
def test_a_hub_that_refuses_is_a_failure_for_model_and_text(error, fact: str, small, monkeypatch) -> None:
    simulate_hub(monkeypatch, error.__new__(error))
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    model, text = problems(doctor(hub_recipe(small)))
    assert (model.name, text.name) == ("model", "text")
    assert model.fails and text.fails
    says(model.fix, fact)
    says(text.fix, "c4: cannot load the data set")


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("Couldn't reach the hub")


@pytest.mark.parametrize("error", [RepositoryNotFoundError, TimeoutError])
def test_an_unreachable_evaluation_text_is_a_warning_and_a_calibration_text_a_failure(
    error, small, monkeypatch
) -> None:
    simulate_hub(monkeypatch, error.__new__(error))
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    (finding,) = problems(doctor(small("evaluation.corpora=[wikitext2]")))
    assert not finding.fails
    says(finding.text(), "WARN ", "wikitext2", "evaluation.corpora: [wikitext2=FILE]")
    (finding,) = problems(doctor(small("calibration.corpus=c4")))
    assert finding.fails
    says(finding.text(), "FAIL ", "c4", "calibration.corpus: FILE")


def cache_model(monkeypatch, weights: bool) -> None:
    """Put someone/model into a simulated hub cache, or only what `search --dry-run` has downloaded of it."""
    tiny_model("llama-gqa").save_pretrained("cached")
    save_tokenizer(Path("cached"))
    if not weights:
        Path("cached/model.safetensors").unlink()
    config = str(Path("cached/config.json").absolute())
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: config)


def test_a_cached_model_needs_no_hub(small, monkeypatch) -> None:
    simulate_hub(monkeypatch, TimeoutError())
    cache_model(monkeypatch, weights=True)
    Path("text.txt").write_text("The king was glad. " * 60)
    overrides = ["model=someone/model", "calibration.corpus=text.txt", "evaluation.seqlen=[16]"]
    assert problems(doctor(small(*overrides))) == []


def test_a_model_of_which_only_the_config_is_cached_is_still_to_be_downloaded(small, monkeypatch) -> None:
    simulate_hub(monkeypatch)
    cache_model(monkeypatch, weights=False)
    findings = doctor(small("model=someone/model"))
    assert problems(findings) == []
    assert any("to download" in finding.state for finding in findings)


def test_a_data_set_that_is_only_cached_is_read_from_the_cache(small, monkeypatch) -> None:
    """Without the hub, `datasets` finds what it has cached, and so does a search."""
    simulate_hub(monkeypatch, TimeoutError())
    rows = [{"text": "The king was glad."}] * 200
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    assert problems(doctor(small("calibration.corpus=wikitext2", "evaluation.corpora=[c4]"))) == []


def test_what_a_recovery_needs_is_a_warning_if_it_is_missing(small, monkeypatch) -> None:
    Path("tales.txt").write_text("The king was glad.")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    monkeypatch.setattr("pgprune_cli.jobs.recovery_request.find_spec", lambda name: None if name == "peft" else name)
    assert problems(doctor(small("recover.corpus=chats.jsonl", "recover.turns=assistant"))) == []
    for overrides, facts in {
        ("recover.train=lora",): ["recovery", "peft is missing", "pip install 'pgprune[recovery]'"],
        ("recover.corpus=nothing.txt",): ["nothing.txt", "Only recover reads this text"],
        ("recover.corpus=tales.txt", "evaluation.corpora=[a=tales.txt]"): ["tales.txt", "evaluation"],
        ("recover.corpus=tales.txt", "recover.turns=assistant"): ["tales.txt", "columns"],
    }.items():
        (warning,) = problems(doctor(small(*overrides)))
        says(warning.text(), "WARN ", *facts)
