"""Recovery by distillation: the loss, and the script: the model gets better, and loads as it did."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.models import VOCABULARY, tiny_model
from helpers.scripts import script_module
from transformers import TrainingArguments

from pgprune_cli.demo.grammar import generate
from pgprune_cli.jobs.evaluate import Corpus, evaluate, open_target
from pgprune_cli.jobs.export import export

pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")


@pytest.fixture(scope="module")
def script():
    return script_module("distill")


def test_the_divergence_is_its_definition(script) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 5, generator=generator)
    p, q = theirs.softmax(-1), ours.softmax(-1)
    assert script.divergence(ours, theirs).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert script.divergence(ours, ours + 3).item() == pytest.approx(0.0, abs=1e-6)


def test_batches_that_are_accumulated_count_as_one_batch(script, tmp_path: Path) -> None:
    tokens = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))

    def first_gradient(batch: int, accumulate: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        student, rows = tiny_model("llama-gqa", seed=1).requires_grad_(True), [{"input_ids": row} for row in tokens]
        teacher = tiny_model("llama-gqa")
        trainer = script.Distillation(student, arguments, train_dataset=rows, teacher=teacher, lm=0.5)
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert first_gradient(4, 2) == pytest.approx(first_gradient(8, 1), rel=1e-3)


@pytest.fixture
def pruned(finished: dict[str, Path], tmp_path: Path) -> Path:
    export(finished["units"], tmp_path / "pruned")
    (tmp_path / "text.txt").write_text(generate(seed=9, characters=40_000))
    return tmp_path / "pruned"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("options", [["--lr", "1e-3"], ["--lr", "1e-2", "--lora", "8", "--lm", "0.5"]])
def test_a_pruned_model_gets_better_and_stays_what_it_was(
    options: list[str], script, pruned: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    if "--lora" in options:
        pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    text = str(tmp_path / "text.txt")
    words = [str(pruned), "--teacher", "demo", "--text", text, "--out", "better"]
    monkeypatch.setattr(sys, "argv", ["distill.py", *words, "--steps", "30", "--seqlen", "32", *options])
    monkeypatch.chdir(tmp_path)
    script.main()
    assert "custom code" not in "".join(capfd.readouterr())  # nobody is asked whether to run the modelling file
    better = tmp_path / "better"
    assert (better / "modeling_pruned.py").read_bytes() == (pruned / "modeling_pruned.py").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "text.txt", "better"}
    held = tmp_path / "held.txt"
    held.write_text(generate(seed=10, characters=10_000))
    before, after = (
        evaluate(open_target(str(where), None, "cpu"), [Corpus("held", str(held))], [32], None)
        for where in (pruned, better)
    )
    assert (after["parameters"], after["dtype"]) == (before["parameters"], before["dtype"])
    assert after["perplexity"][0]["ppl"] < 0.95 * before["perplexity"][0]["ppl"]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["demo", "--teacher", "demo", "--text", "demo", "--out", "{here}"], "{here}: exists already"),
        (
            ["{here}/other", "--teacher", "demo", "--text", "demo", "--out", "{here}/out"],
            "demo: is not the dense model of {here}/other: vocabularies of 96 and 745 tokens",
        ),
    ],
)
def test_what_is_wrong_is_one_line(script, words: list[str], fault: str, tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoTokenizer

    from pgprune_cli.model.source import DEMO_MODEL

    tiny_model("llama-gqa").save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", ["distill.py", *(word.format(here=tmp_path) for word in words)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == f"distill: {fault.format(here=tmp_path)}"
    assert not (tmp_path / "out").exists()
