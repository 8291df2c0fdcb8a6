"""scripts/distill.py: the pruned model improves, and loads as before. The method is tested in tests/recover."""

import sys
from pathlib import Path

import pytest
from helpers.messages import says
from helpers.models import tiny_model
from helpers.scripts import script_module

from pgprune_cli.demo.grammar import generate
from pgprune_cli.jobs.evaluation_request import Corpus
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.perplexity import measure_perplexity
from pgprune_cli.jobs.targets import open_target

pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")


@pytest.fixture(scope="module")
def script():
    return script_module("distill")


@pytest.fixture
def pruned(finished: dict[str, Path], tmp_path: Path) -> Path:
    export(finished["units"], tmp_path / "pruned")
    (tmp_path / "text.txt").write_text(generate(seed=9, characters=40_000))
    return tmp_path / "pruned"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("options", [["--lr", "1e-3"], ["--lr", "1e-2", "--lora", "8", "--lm", "0.5"]])
def test_distill_improves_the_model_and_keeps_its_shape_and_files(
    options: list[str], script, pruned: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    if "--lora" in options:
        pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    text = str(tmp_path / "text.txt")
    words = [str(pruned), "--teacher", "demo", "--text", text, "--out", "better"]
    monkeypatch.setattr(sys, "argv", ["distill.py", *words, "--steps", "30", "--seqlen", "32", *options])
    monkeypatch.chdir(tmp_path)
    script.main()
    assert "custom code" not in "".join(capfd.readouterr())  # the user is not asked whether to run the modelling file
    better = tmp_path / "better"
    assert (better / "modeling_pruned.py").read_bytes() == (pruned / "modeling_pruned.py").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "text.txt", "better"}
    held = tmp_path / "held.txt"
    held.write_text(generate(seed=10, characters=10_000))
    targets = [open_target(str(folder), device="cpu") for folder in (pruned, better)]
    before, after = (target.description() for target in targets)
    assert (after["parameters"], after["dtype"]) == (before["parameters"], before["dtype"])
    rows = [measure_perplexity(target, [Corpus("held", str(held))], [32])[0] for target in targets]
    assert rows[1]["ppl"] < 0.95 * rows[0]["ppl"]


def test_distill_refuses_an_output_that_exists(script, tmp_path: Path, monkeypatch) -> None:
    words = ["demo", "--teacher", "demo", "--text", "demo", "--out", str(tmp_path)]
    says(refusal_of(script, words, monkeypatch), "distill:", str(tmp_path), "already exists")


def test_distill_refuses_a_teacher_with_another_vocabulary(script, tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoTokenizer

    from pgprune_cli.model.source import DEMO_MODEL

    tiny_model("llama-gqa").save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "other")
    words = [str(tmp_path / "other"), "--teacher", "demo", "--text", "demo", "--out", str(tmp_path / "out")]
    says(refusal_of(script, words, monkeypatch), "distill: demo:", str(tmp_path / "other"), "96", "745")
    assert not (tmp_path / "out").exists()


def refusal_of(script, words: list[str], monkeypatch) -> str:
    """Run the script with `words` and return the one line it stops with."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *words])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert "\n" not in stopped.value.code
    return stopped.value.code
