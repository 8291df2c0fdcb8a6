"""Exported models can be trained like any other, by transformers' Trainer and peft, without pgprune in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.exports import DECISIONS, export
from helpers.masks import draw
from helpers.models import tiny_model

SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

def trained(model, **options):
    window = torch.arange(3, 23)  # one sentence, to be memorised
    rows = [{"input_ids": window, "labels": window}] * 16
    arguments = TrainingArguments(
        output_dir="trainer", max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.5 * float(losses[0]), losses
    return model.eval()

@torch.no_grad()
def logits(model):
    return model(torch.arange(40, 60)[None]).logits

def full(directory):
    model = trained(loaded(directory), gradient_checkpointing=True)
    before = dict(loaded(directory).named_parameters())
    untouched = [name for name, now in model.named_parameters() if now.equal(before[name])]
    assert not untouched, untouched
    model.save_pretrained(f"{directory}-again")
    torch.testing.assert_close(logits(loaded(f"{directory}-again")), logits(model), atol=1e-5, rtol=1e-5)

def lora(directory):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = trained(get_peft_model(loaded(directory), LoraConfig(r=4, target_modules="all-linear")))
    model.save_pretrained(f"{directory}-adapter")
    again = PeftModel.from_pretrained(loaded(directory), f"{directory}-adapter").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert merged.model.embed_tokens.weight.equal(loaded(directory).model.embed_tokens.weight)
    merged.save_pretrained(f"{directory}-again")
    torch.testing.assert_close(logits(loaded(f"{directory}-again")), logits(again), atol=1e-4, rtol=1e-4)

for directory in sys.argv[2:]:
    print(directory, file=sys.stderr)
    {"full": full, "lora": lora}[sys.argv[1]](directory)
assert not any(name.startswith("pgprune") for name in sys.modules)
"""


DIRECTORIES = {"mixed": "mixed sizes", "empty": "two layers without heads, two without channels"}
"""Directories, and the decisions that are exported into them."""


@pytest.mark.parametrize("way", ["full", "lora"])
def test_an_exported_model_can_be_trained(way: str, tmp_path: Path) -> None:
    if way == "lora":
        pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")
    model = tiny_model("llama-gqa")
    model.save_pretrained(tmp_path / "base")
    for name, decision in DIRECTORIES.items():
        export(tmp_path / "base", tmp_path / name, draw(model, DECISIONS[decision]))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [
        sys.executable,
        "-I",
        "-c",
        SCRIPT,
        way,
        *DIRECTORIES,
    ]  # one process for both, because its imports take longest
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
