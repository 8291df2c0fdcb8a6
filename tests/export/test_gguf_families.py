"""GGUF files of every family, in llama.cpp: their outputs are those of the masked dense model, or they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llamacpp
from helpers.exports import decide, export
from helpers.masks import LAYERS, draw, masked, random_repair, repaired_by_hand
from helpers.messages import refused
from helpers.models import VOCABULARY, save_tokenizer, tiny_config

from pgprune_cli.export import gguf as writer
from pgprune_cli.export.plan import Options
from pgprune_cli.export.trained import plan_again
from pgprune_cli.model.masks import RepairedBlocks
from pgprune_cli.model.source import resolve

pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

EQUAL = [((2, 1), (1, 32))] * LAYERS
WHOLE_HEADS = [((4, 2), (1, 32))] * LAYERS
UNEQUAL = [((4, 1), (1, 32)), ((1, 2), (1, 64)), ((3, 2), (1, 32)), ((2, 1), (1, 64))]
EMPTY = [((4, 1), (1, 32)), (0, (1, 64)), ((3, 2), (1, 32)), ((2, 1), (1, 64))]

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 64}
MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "factor": 8.0}
LONGROPE |= {"short_factor": [1.0, 1.3], "long_factor": [2.0, 3.0]}
TANH = 5e-3
"""llama.cpp's GELU reads a table in float16."""

FAMILIES: dict[str, tuple[str, dict[str, Any], list, str, float]] = {
    "qwen3, unequal": ("qwen3", {}, UNEQUAL, "openelm", 2e-4),
    "smollm3": ("smollm3", {}, EQUAL, "smollm3", 2e-4),
    "granite": ("granite", {}, EQUAL, "granite", 2e-4),
    "granite, unequal": ("granite", {}, EMPTY, "deci", 2e-4),
    "granite, tied and unequal": ("granite", {"tie_word_embeddings": True}, EMPTY, "deci", 2e-4),
    "ministral3": (
        "ministral3",
        {"rope_parameters": MINISTRAL | {"original_max_position_embeddings": 8}},
        EQUAL,
        "mistral3",
        2e-4,
    ),
    "ministral3, unequal": ("ministral3", {"rope_parameters": MINISTRAL}, EMPTY, "deci", 2e-4),
    "seed_oss": ("seed_oss", {}, EQUAL, "deci", 2e-4),
    "seed_oss, unequal": ("seed_oss", {}, EMPTY, "deci", 2e-4),
    "phi3, all heads": ("phi3", {"sliding_window": None}, WHOLE_HEADS, "phi3", 2e-4),
    "phi3": ("phi3", {"sliding_window": None}, EQUAL, "deci", 2e-4),
    "phi3, unequal": ("phi3", {"sliding_window": None}, EMPTY, "deci", 2e-4),
    "phi3, short texts": (
        "phi3",
        {"sliding_window": None, "rope_parameters": LONGROPE | {"original_max_position_embeddings": 1024}},
        EMPTY,
        "deci",
        2e-4,
    ),
    "phi3, long texts": (
        "phi3",
        {"sliding_window": None, "rope_parameters": LONGROPE | {"original_max_position_embeddings": 8}},
        EMPTY,
        "deci",
        5e-4,
    ),
    "gemma": ("gemma", {}, EQUAL, "gemma", 4 * TANH),  # without norms after its blocks, their errors add up
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 11}, EQUAL, "gemma2", TANH),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 11}, EQUAL, "gemma3", TANH),
    "olmo2": ("olmo2", {}, WHOLE_HEADS, "olmo2", 2e-4),
    "olmo3": ("olmo3", {"sliding_window": 6}, WHOLE_HEADS, "olmo2", 2e-4),
}
"""By name: the tiny model, changes to its config, what each layer keeps, llama.cpp's architecture, the tolerance."""

REFITTED = ("qwen3, unequal", "granite, unequal", "phi3, all heads", "phi3", "gemma2", "olmo2")
"""Those that are also tried with refitted weights: projections fused or split, heads in halves or pairs, post norms."""


def saved(architecture: str, directory: Path, **changes: Any):
    """Save a random model with 64 channels, and heads that are as wide together as the residual stream."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    for name, value in ({"hidden_size": 64, "intermediate_size": 64} | changes).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.25)
    model.eval().requires_grad_(False).save_pretrained(directory)
    save_tokenizer(directory)
    return model


def write(model: Any, base: Path, out: Path, counts: list, repaired: RepairedBlocks | None = None) -> writer.FilePlan:
    decision = replace(decide(base, draw(model, counts)), repaired=repaired or {})
    planned = writer.plan(resolve(str(base)), decision, Options())
    planned.write(out, lambda _: None)
    return planned


@pytest.mark.parametrize(
    ("name", "refitted"), [*((name, False) for name in FAMILIES), *((name, True) for name in REFITTED)]
)
def test_llama_cpp_has_the_outputs_of_the_masked_dense_model(name, refitted, tmp_path):
    llamacpp.require()
    architecture, changes, counts, expected, tolerance = FAMILIES[name]
    model = saved(architecture, tmp_path / "base", **changes)
    model_mask = draw(model, counts)
    repaired = random_repair(model, model_mask, bias=False) if refitted else {}
    planned = write(model, tmp_path / "base", tmp_path / "out.gguf", counts, repaired)
    model = repaired_by_hand(model, model_mask, repaired)
    assert planned.architecture == expected
    prompt = torch.randint(3, VOCABULARY, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    [(ids, log_probabilities)] = llamacpp.generate([tmp_path / "out.gguf"], prompt, 12, VOCABULARY)
    with torch.inference_mode(), masked(model, model_mask):
        logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert (log_probabilities - logits.log_softmax(-1)).abs().max() < tolerance


@pytest.mark.parametrize(
    ("architecture", "changes", "counts", "facts"),
    [
        ("smollm3", {}, UNEQUAL, ("smollm3", "different sizes", "budget.scope: per-layer", "--format hf")),
        ("gemma2", {}, UNEQUAL, ("gemma2", "different sizes", "budget.scope: per-layer")),
        ("gemma3_text", {}, UNEQUAL, ("gemma3_text", "different sizes", "budget.scope: per-layer")),
        ("olmo2", {}, UNEQUAL, ("olmo2", "different sizes", "budget.scope: per-layer")),
        ("smollm3", {}, [(0, 0), *EQUAL[1:]], ("smollm3", "every 4th layer", "--format hf")),
        ("gemma2", {"attn_logit_softcapping": None}, EQUAL, ("gemma2", "attn_logit_softcapping", "--format hf")),
        ("gemma2", {"final_logit_softcapping": None}, EQUAL, ("gemma2", "final_logit_softcapping", "--format hf")),
    ],
    ids=["smollm3", "gemma2", "gemma3", "olmo2", "smollm3-without-a-layer", "uncapped-scores", "uncapped-logits"],
)
def test_what_llama_cpp_cannot_compute_is_refused_with_what_can_be_done(architecture, changes, counts, facts, tmp_path):
    model = saved(architecture, tmp_path / "base", **changes)
    with refused(*facts):
        write(model, tmp_path / "base", tmp_path / "new" / "out.gguf", counts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama-gqa", {"rope_parameters": YARN}),
        ("phi3", {"sliding_window": None, "rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}}),
    ],
    ids=["yarn", "longrope"],
)
def test_an_exported_model_with_unequal_heads_has_the_rope_of_the_dense_one(architecture, changes, tmp_path):
    import gguf

    model = saved(architecture, tmp_path / "base", **changes)
    counts = [((4, 1), 64), ((1, 2), 32), ((3, 2), 32), ((2, 1), 64)]  # nothing to pad
    write(model, tmp_path / "base", tmp_path / "direct.gguf", counts)
    export(tmp_path / "base", tmp_path / "pruned", draw(model, counts))
    plan_again(tmp_path / "pruned", format="gguf").write(tmp_path / "again.gguf", lambda _: None)
    readers = [gguf.GGUFReader(tmp_path / name) for name in ("direct.gguf", "again.gguf")]
    ropes = [{t.name: t.data.tolist() for t in reader.tensors if t.name.startswith("rope")} for reader in readers]
    assert ropes[0] and ropes[0] == ropes[1]
