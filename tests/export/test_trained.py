"""Exported models that are written again: with trained weights, and in other formats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llamacpp
from helpers.exports import decide, export, replay
from helpers.masks import Count, draw, random_repair, random_tokens
from helpers.messages import refused
from helpers.models import VOCABULARY, save_tokenizer, tiny_model
from helpers.recoveries import RECORD, recover, trained, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pgprune_cli.export.gguf_checksum import fault_of
from pgprune_cli.export.plan import Options
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.export.trained import plan_again
from pgprune_cli.jobs.verify import verify
from pgprune_cli.storage.safetensors_file import stored_tensors

UNEQUAL: list[tuple[Count, Count]] = [(0, 24), ((3, 1), 7), (4, 0), (2, 5)]
EQUAL: list[tuple[Count, Count]] = [(2, 7)] * 4
EXPERTS: list[tuple[Count, Count]] = [(4, (8, 12)), ((2, 1), (4, 8)), (1, (8, 4)), (4, (3, 12))]
MODELS: dict[str, tuple[str, list[tuple[Count, Count]]]] = {
    "llama-mha": ("llama-mha", UNEQUAL),
    "llama-mha, equal layers": ("llama-mha", EQUAL),
    "llama-gqa": ("llama-gqa", UNEQUAL),
    "mistral": ("mistral", UNEQUAL),
    "qwen3": ("qwen3", UNEQUAL),
    "gemma3_text": ("gemma3_text", UNEQUAL),
    "phi3": ("phi3", UNEQUAL),
    "mixtral": ("mixtral", EXPERTS),
    "gpt_oss": ("gpt_oss", EXPERTS),
}


def prune(architecture: str, sizes: list[tuple[Count, Count]], folder: Path, **options: Any) -> Path:
    """Return an exported model of these sizes."""
    model = tiny_model(architecture)
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    export(folder / "base", folder / "pruned", draw(model, sizes), **options)
    return folder / "pruned"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unequal Llama with tied embeddings."""
    return prune("llama-gqa", UNEQUAL, tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(random_tokens()).logits
    return result


def load(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_trained_weights_arrive_bit_for_bit_and_all_else_is_as_it_was(name: str, tmp_path: Path) -> None:
    pruned, out = prune(*MODELS[name], tmp_path), tmp_path / "recovered"
    model = recover(pruned, out)
    loaded, expected = load(out), model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(load(pruned)), logits(model))
    before, after = (stored_tensors(path / "model.safetensors") for path in (pruned, out))
    assert before == after
    assert json.loads((pruned / "config.json").read_text()) == json.loads((out / "config.json").read_text())
    files = {path.name for path in pruned.iterdir()}
    assert {path.name for path in out.iterdir()} == files | {"recovery.json"}
    changed = {"README.md", "SHA256SUMS", "model.safetensors", "config.json"}
    assert all((pruned / file).read_bytes() == (out / file).read_bytes() for file in files - changed)
    assert verify(out).faults == []


def test_weights_of_another_dtype_are_written_in_that_of_the_student(tmp_path: Path) -> None:
    pruned = prune("llama-gqa", UNEQUAL, tmp_path, dtype="bfloat16")
    model = recover(pruned, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_weights_that_were_not_trained_stay(llama: Path, tmp_path: Path) -> None:
    state, key = trained(llama).state_dict(), "model.norm.weight"
    write(llama, {key: state[key]}, tmp_path / "out")
    before, after = load(llama).state_dict(), load(tmp_path / "out").state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [key]
    assert torch.equal(after[key], state[key])


def test_files_are_split_as_those_of_the_student(tmp_path: Path) -> None:
    pruned = prune("llama-gqa", UNEQUAL, tmp_path, shard_size=20_000)
    recover(pruned, tmp_path / "out")
    names = [path.name for path in pruned.glob("*.safetensors*")]
    assert len(names) > 4
    for name in names:
        if name.startswith("model-"):
            assert stored_tensors(pruned / name) == stored_tensors(tmp_path / "out" / name)


def test_fitted_output_biases_are_kept(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    model.save_pretrained(tmp_path / "base")
    mask = draw(model, [(4, 24), (3, 7), (4, 9), (2, 5)])
    decision = dataclasses.replace(decide(tmp_path / "base", mask), repaired=random_repair(model, mask, bias=True))
    replay(decision, tmp_path / "pruned")
    recovered = recover(tmp_path / "pruned", tmp_path / "out")
    assert any(name.endswith("o_proj.bias") for name in recovered.state_dict())
    assert torch.equal(logits(load(tmp_path / "out")), logits(recovered))


def test_damage_is_found(llama: Path, tmp_path: Path) -> None:
    recover(llama, tmp_path / "out")
    record = tmp_path / "out" / "recovery.json"
    record.write_text(record.read_text().replace("1000", "9000"))
    (fault,) = verify(tmp_path / "out").faults
    assert "recovery.json" in fault
    with refused("recovery.json", "checksum"):
        plan_again(tmp_path / "out")


Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
WRONG: dict[str, tuple[Change, tuple[str, ...]]] = {
    "name": (lambda state: {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}, ("model.layers.9", "no weight")),
    "shape": (lambda state: {"model.norm.weight": torch.ones(31)}, ("model.norm.weight", "(31,)", "(32,)")),
    "NaN": (lambda state: {"model.norm.weight": torch.full((32,), torch.nan)}, ("model.norm.weight", "NaN")),
    "head": (lambda state: state | {"lm_head.weight": torch.ones(VOCABULARY, 32)}, ("lm_head.weight", "ties")),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_refused(kind: str, llama: Path, tmp_path: Path) -> None:
    change, facts = WRONG[kind]
    with refused(*facts):
        write(llama, change(trained(llama).state_dict()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    pruned = prune("mixtral", EXPERTS, tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    with refused(name, "(3, 32, 12)"):
        write(pruned, {name: torch.ones(3, 32, 12)}, tmp_path / "out")


def test_a_directory_without_a_decision_is_refused(llama: Path, tmp_path: Path) -> None:
    with refused("decision.json", "missing"):
        plan_again(llama.parent / "base")


# --- other formats


def test_gguf_of_an_exported_model_computes_the_same(tmp_path: Path) -> None:
    """Blocks that llama.cpp needs and the model lacks are filled with zeros."""
    pytest.importorskip("gguf")
    llamacpp.require()
    files, models = [], []
    for name in ("llama-mha", "llama-mha, equal layers", "llama-gqa", "mistral"):
        folder = tmp_path / name.replace(",", "")
        pruned = prune(*MODELS[name], folder)
        model = trained(pruned)
        path = folder / "out.gguf"
        plan = write(pruned, model.state_dict(), path, "gguf")
        assert plan.shapes.padded == (MODELS[name][1] is UNEQUAL) and fault_of(path) == ""
        assert plan.parameters_before == sum(tensor.numel() for tensor in model.parameters())
        files.append(path)
        models.append(model)
    prompt = random_tokens(rows=1, length=9)[0].tolist()
    for model, (ids, log_probabilities) in zip(models, llamacpp.generate(files, prompt, 6, VOCABULARY), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert (log_probabilities - expected.log_softmax(-1)).abs().max() < 2e-4


def test_gguf_tells_the_recovery(llama: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    recover(llama, tmp_path / "out")
    plan_again(tmp_path / "out", format="gguf").write(tmp_path / "out.gguf", lambda _: None)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    (record,) = json.loads(fields["pgprune.recovery"].contents())
    assert record["tokens"] == RECORD.tokens and fields["pgprune.kept.ffn_channels"].contents() == [24, 7, 0, 5]


def test_padding_of_an_exported_model_adds_nothing(llama: Path, tmp_path: Path) -> None:
    model = recover(llama, tmp_path / "recovered")
    requirements = ShapeRequirements("every", "every", pad_kv_heads=2, pad_ffn=8)
    plan = plan_again(tmp_path / "recovered", Options(requirements))
    plan.write(tmp_path / "padded", lambda _: None)
    assert [sizes["ffn"][1] for sizes in plan.shapes.sizes()] == [24, 8, 8, 8]
    assert [sizes["attention"][0] for sizes in plan.shapes.sizes()] == [2, 4, 4, 2]
    torch.testing.assert_close(logits(load(tmp_path / "padded")), logits(model), atol=1e-5, rtol=1e-5)
    assert verify(tmp_path / "padded").faults == []


def test_experts_can_be_padded(tmp_path: Path) -> None:
    pruned = prune("mixtral", EXPERTS, tmp_path)
    plan = plan_again(pruned, Options(ShapeRequirements(pad_ffn=8)))
    plan.write(tmp_path / "padded", lambda _: None)
    assert [sizes["ffn"] for sizes in plan.shapes.sizes()] == [(8, 12), (4, 8), (8, 8), (3, 12)]
    torch.testing.assert_close(logits(load(tmp_path / "padded")), logits(load(pruned)), atol=1e-5, rtol=1e-5)


def test_mlx_of_an_exported_model_is_the_directory_and_one_file(llama: Path, tmp_path: Path) -> None:
    recover(llama, tmp_path / "recovered")
    plan_again(tmp_path / "recovered", format="mlx").write(tmp_path / "mlx", lambda _: None)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["model_file"] == "modeling_mlx.py" and verify(tmp_path / "mlx").faults == []
    assert "modeling_mlx.py" in (tmp_path / "mlx" / "README.md").read_text()
    for name in ("model.safetensors", "recovery.json", "decision.json"):
        assert (tmp_path / "mlx" / name).read_bytes() == (tmp_path / "recovered" / name).read_bytes()
    plan_again(tmp_path / "mlx").write(tmp_path / "plain", lambda _: None)
    assert not (tmp_path / "plain" / "modeling_mlx.py").exists()
    assert "model_file" not in json.loads((tmp_path / "plain" / "config.json").read_text())


# --- the card


def test_card_tells_the_recovery_and_not_what_was_measured_before(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    model.save_pretrained(tmp_path / "base")
    row = {"corpus": "c4", "seqlen": 128, "bos": True, "ppl": 9.0, "tokens": 127}
    export(tmp_path / "base", tmp_path / "pruned", draw(model, UNEQUAL), {"perplexity": [row]})
    path = tmp_path / "pruned" / "README.md"
    path.write_text(f"{path.read_text()}\n## Licence\n\nOurs.\n")
    recover(tmp_path / "pruned", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    facts = ("# out\n", "1,000 tokens", "10 steps", "4 seconds", "1.2500 to 0.5000 nats", "step 8", "All weights")
    assert [fact for fact in (*facts, "`dense`", "`beef`", "`f00d`", "## Licence\n\nOurs.") if fact not in text] == []
    assert "nothing was retrained" not in text and "until they were trained (see Recovery)" in text
    assert "## Perplexity" not in text and "/home" not in text and 'from_pretrained("out"' in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    kept = ["## How to load it", "## What was kept"]
    assert headings == [*kept, "## Recovery", "## Where it comes from", "## Licence"]
    plan_again(tmp_path / "pruned").write(tmp_path / "copy", lambda _: None)
    assert "## Perplexity" in (tmp_path / "copy" / "README.md").read_text()


def test_card_and_record_tell_every_recovery(llama: Path, tmp_path: Path) -> None:
    recover(llama, tmp_path / "first")
    recover(tmp_path / "first", tmp_path / "second", train="lora", lora_rank=4, tokens=500, best_step=10)
    text = (tmp_path / "second" / "README.md").read_text()
    assert "1,000 tokens" in text and "500 tokens" in text and text.count("## Recovery") == 1
    assert "Adapters of rank 4 were trained and merged" in text
    record = json.loads((tmp_path / "second" / "recovery.json").read_text())
    assert record["tokens"] == 500 and [earlier["tokens"] for earlier in record["earlier"]] == [1000]


def test_card_is_made_if_there_is_none(llama: Path, tmp_path: Path) -> None:
    recover(llama, tmp_path / "first")
    (tmp_path / "first" / "README.md").unlink()
    plan_again(tmp_path / "first").write(tmp_path / "second", lambda _: None)
    text = (tmp_path / "second" / "README.md").read_text()
    assert "# second\n" in text and "## Recovery" in text and "## Where it comes from" in text
