"""The modelling file of exports: every family, with unequal layers, computes what the dense model does."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.cut import VARIANTS, dense_and_pruned
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, VOCABULARY, tiny_config
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from pgprune_cli.serving import modeling_pruned
from pgprune_cli.serving.modeling_pruned import FAMILIES, TASKS, Nothing

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
ALL = [name for name in ARCHITECTURES + EXPERT_ARCHITECTURES if name != "llama-mha"]
# Not llama-mha, because its KV heads have one query head each.

every_family = pytest.mark.parametrize("name", ALL)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# transformers says that its fast kernels of linear attention are not installed.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*falling back")]


def tokens(rows: int = 2, length: int = 30) -> torch.Tensor:
    """Return random tokens, more than the sliding windows of 16."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def test_every_family_of_the_tiny_models_has_a_class():
    assert {tiny_config(name).model_type for name in ALL} == set(FAMILIES) == set(modeling_pruned.DENSE)


@every_family
@every_variant
@pytest.mark.parametrize("biases", [False, True], ids=["", "output biases"])
@torch.inference_mode()
def test_logits_are_those_of_the_dense_model_without_the_removed_units(name, variant, biases):
    dense, pruned = dense_and_pruned(name, variant, biases)
    torch.testing.assert_close(pruned(tokens()).logits, dense(tokens()).logits, **TOLERANCE)


@every_family
@every_variant
@torch.inference_mode()
def test_generation_with_a_cache_and_left_padding_equals_recomputation(name, variant):
    _, pruned = dense_and_pruned(name, variant)
    prompts = tokens(rows=2, length=13)
    mask = torch.ones_like(prompts)
    prompts[0, :4], mask[0, :4] = 0, 0
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    cached = pruned.generate(prompts, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, pruned.generate(prompts, attention_mask=mask, use_cache=False, **options))
    short = torch.ones_like(prompts[:1, 4:])
    alone = pruned.generate(prompts[:1, 4:], attention_mask=short, use_cache=True, **options)
    assert torch.equal(cached[0, 4:], alone[0])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gemma3_text", "olmo3", "gpt_oss"])
@every_variant
@torch.inference_mode()
def test_a_pruned_model_drafts_for_the_dense_one_and_the_dense_one_for_it(name, variant):
    """transformers crops the cache after every draft, also that of layers without attention."""
    models = dense_and_pruned(name, variant)
    prompt = tokens(rows=1, length=13)
    options = {
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(prompt),
    }
    for model, draft in (models, reversed(models)):
        assert torch.equal(model.generate(prompt, assistant_model=draft, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3_text"])
@every_variant
@torch.inference_mode()
def test_generation_with_a_static_cache_equals_that_with_a_dynamic_one(name, variant):
    _, pruned = dense_and_pruned(name, variant)
    prompts = tokens(rows=2, length=13)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(prompts), "disable_compile": True}
    dynamic = pruned.generate(prompts, **options)
    for chunks in ({}, {"prefill_chunk_size": 4}):
        assert torch.equal(pruned.generate(prompts, cache_implementation="static", **options, **chunks), dynamic)


@every_family
@every_variant
@torch.inference_mode()
def test_every_slot_of_the_cache_that_counts_tokens_is_filled(name, variant):
    """An offloaded cache fetches a slot to the GPU while the one before it is filled."""
    _, pruned = dense_and_pruned(name, variant)
    cache = pruned(tokens(length=13), use_cache=True).past_key_values
    slots = [slot for slot in cache.layers if hasattr(slot, "get_seq_length")]
    assert {int(slot.get_seq_length()) for slot in slots} == {13}
    assert len(cache.layers) == pruned.config.num_hidden_layers


@pytest.mark.parametrize("name", EXPERT_ARCHITECTURES)
@every_variant
def test_the_load_balancing_loss_adds_up_layers_with_different_numbers_of_experts(name, variant):
    _, pruned = dense_and_pruned(name, variant)
    pruned = copy.deepcopy(pruned).requires_grad_()
    pruned.config.output_router_logits = True  # as some published models have it
    outputs = pruned(tokens(), labels=tokens())
    kept = [len(layer.expert_channels) for layer in VARIANTS[variant] if layer.channels]
    assert [int(logits.isfinite().any(0).sum()) for logits in outputs.router_logits] == kept
    shares, means = torch.zeros(8), torch.zeros(8)
    for logits in outputs.router_logits:
        probabilities = logits.detach().softmax(-1)
        chosen = probabilities.topk(pruned.config.num_experts_per_tok).indices
        shares += torch.bincount(chosen.flatten(), minlength=8) / len(logits) / len(kept)
        means += probabilities.mean(0) / len(kept)
    torch.testing.assert_close(outputs.aux_loss.detach(), 8 * (shares * means).sum())
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in pruned.parameters() if parameter.grad is not None)


@every_family
@torch.inference_mode()
def test_set_attn_implementation_reaches_every_layer(name):
    dense, pruned = dense_and_pruned(name, "no attention at first")
    called = []

    def counted(module, *arguments, **options):
        called.append(module)
        return eager(module, *arguments, **options)

    eager = sys.modules[type(pruned).dense.__module__].eager_attention_forward
    AttentionInterface.register("counted", counted)
    for model in (dense, pruned):
        model.set_attn_implementation("eager")
    torch.testing.assert_close(pruned(tokens()).logits, dense(tokens()).logits, **TOLERANCE)
    pruned.config._attn_implementation = "counted"
    pruned(tokens(length=8))
    blocks = [getattr(layer, "self_attn", None) for layer in pruned.model.layers]
    assert called == [block for block in blocks if block is not None and not isinstance(block, Nothing)]


@pytest.mark.parametrize("name", EXPERT_ARCHITECTURES)
@torch.inference_mode()
def test_set_experts_implementation_reaches_every_layer(name):
    dense, pruned = dense_and_pruned(name, "a layer fewer")
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        pruned.set_experts_implementation(implementation)
        blocks = [layer.mlp for layer in pruned.model.layers if not isinstance(layer.mlp, Nothing)]
        assert {block.experts.config._experts_implementation for block in blocks} == {implementation}
        torch.testing.assert_close(pruned(tokens()).logits, dense(tokens()).logits, **TOLERANCE)


@pytest.mark.parametrize("name", EXPERT_ARCHITECTURES)
def test_experts_that_grouped_mm_cannot_compute_run_without_it(name):
    _, pruned = dense_and_pruned(name, "no attention at first")
    assert pruned.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="experts of 5 channels: grouped_mm needs a multiple of 8"):
        pruned.set_experts_implementation("grouped_mm")


@every_family
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_a_head_for_another_task_is_put_on_the_pruned_decoder(saved, name, task, tmp_path):
    auto = getattr(transformers, f"AutoModelFor{task}")
    model, info = auto.from_pretrained(saved / name, num_labels=2, output_loading_info=True)
    head = "qa_outputs" if task == "QuestionAnswering" else "score"
    assert {key.split(".")[0] for key in info["missing_keys"]} == {head}
    assert info["unexpected_keys"] <= {"lm_head.weight", "lm_head.bias"}
    _, pruned = dense_and_pruned(name, "no attention at first", biases=True)
    with torch.inference_mode():
        expected = pruned.model(tokens()).last_hidden_state
        torch.testing.assert_close(model.model(tokens()).last_hidden_state, expected, **TOLERANCE)
    output = model(tokens())
    shape = {"SequenceClassification": (2, 2), "TokenClassification": (2, 30, 2), "QuestionAnswering": (2, 30)}[task]
    assert output[0].shape == shape
    output[0].sum().backward()
    assert next(model.model.layers[-1].parameters()).grad is not None
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(tokens())[0], output[0], **TOLERANCE)


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
assert "pgprune_cli" not in sys.modules
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    torch.save(model(torch.load(f"{directory}/tokens.pt")).logits.detach(), f"{directory}/logits.pt")
    model.save_pretrained(f"{directory}/again")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directories of all families, which one process without pgprune has loaded and saved again."""
    root = tmp_path_factory.mktemp("exports")
    for name in ALL:
        dense_and_pruned(name, "no attention at first", biases=True)[1].save_pretrained(root / name)
        torch.save(tokens(), root / name / "tokens.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT, *(str(root / name) for name in ALL)]
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return root


@every_family
@torch.inference_mode()
def test_a_saved_model_loads_in_a_process_without_pgprune_and_saves_its_code_again(saved, name):
    dense, _ = dense_and_pruned(name, "no attention at first", biases=True)
    torch.testing.assert_close(torch.load(saved / name / "logits.pt"), dense(tokens()).logits, **TOLERANCE)
    code = (saved / name / "modeling_pruned.py").read_bytes()
    assert code == (saved / name / "again" / "modeling_pruned.py").read_bytes()
    configs = [json.loads((saved / path / "config.json").read_text()) for path in (name, f"{name}/again")]
    assert configs[0] == configs[1]


@every_family
@torch.inference_mode()
def test_config_and_model_survive_saving_copying_and_pickling(saved, name):
    _, pruned = dense_and_pruned(name, "no attention at first", biases=True)
    config = AutoConfig.from_pretrained(saved / name)
    assert type(config) is type(pruned.config)
    assert config.to_dict()["per_layer_config"] == pruned.config.to_dict()["per_layer_config"]
    loaded = AutoModelForCausalLM.from_pretrained(saved / name)
    assert type(loaded) is type(pruned)
    expected = pruned(tokens()).logits
    for model in (loaded, copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        torch.testing.assert_close(model(tokens()).logits, expected, **TOLERANCE)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == model.config.tie_word_embeddings
