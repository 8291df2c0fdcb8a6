"""Exported models are trained as any other: by transformers' Trainer and peft, without pgprune in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model
from test_hf import DECISIONS, draw, export

SCRIPT = """
import copy, sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

def trained(model, **options):
    window = torch.arange(3, 23)  # one sentence, to be learnt by heart
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
    untouched = [name for name, now in model.named_parameters() if now.equal(before[name])]
    assert not untouched, untouched
    model.save_pretrained("again-full")
    torch.testing.assert_close(logits(loaded("again-full")), logits(model), atol=1e-5, rtol=1e-5)

def lora(directory):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = trained(get_peft_model(loaded(directory), LoraConfig(r=4, target_modules="all-linear")))
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(loaded(directory), "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert merged.model.embed_tokens.weight.equal(before["model.embed_tokens.weight"])
    merged.save_pretrained("again-lora")
    torch.testing.assert_close(logits(loaded("again-lora")), logits(again), atol=1e-4, rtol=1e-4)

before = {name: value.detach().clone() for name, value in loaded("pruned").named_parameters()}
{"full": full, "lora": lora}[sys.argv[1]]("pruned")
assert not any(name.startswith("pgprune") for name in sys.modules)
"""


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("decision", ["some of everything", "no heads twice, no channels last"])
def test_an_exported_model_learns(way: str, decision: str, tmp_path: Path) -> None:
    if way == "lora":
        pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[recovery]'")
    tiny_model("llama-gqa").save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "pruned", draw(DECISIONS[decision]))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT, way]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
