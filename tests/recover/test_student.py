"""What a recovery trains of a student."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from helpers.models import VOCABULARY, tiny_model

from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import Trained
from pgprune_cli.recover.student import (
    loaded_dtype,
    norms_and_outputs,
    trainable,
    trained_names,
    trained_parameters,
    trained_tensors,
)

TOKENS = torch.arange(2 * 12).view(2, 12) % VOCABULARY


def test_norms_and_outputs_are_found_in_every_family(any_architecture: str) -> None:
    model = PrunableModel.of(tiny_model(any_architecture))
    names = list(norms_and_outputs(model))
    shapes = {name: parameter.shape for name, parameter in model.module.named_parameters()}
    hidden = model.config.hidden_size
    assert len(names) == len(set(names))
    assert {name for name in names if "layers" not in name} <= {
        f"{model.family.final_norm}.weight",
        f"{model.family.final_norm}.bias",
    }
    for index, layer in enumerate(model.layers):
        mine = [name for name in names if name.startswith(f"{model.family.layers}.{index}.")]
        matrices = [name for name in mine if len(shapes[name]) > 1]
        assert len(matrices) == len(model.family.blocks_of(layer))  # one output projection for each block
        assert all(hidden in shapes[name] for name in matrices)
        norms = {name for name in shapes if name.startswith(f"{model.family.layers}.{index}.") and "norm" in name}
        assert norms <= set(mine)


def test_all_weights_are_trained_in_float32_and_a_tied_one_once() -> None:
    module = tiny_model("llama-gqa").to(torch.bfloat16)
    student = trainable(PrunableModel.of(module), "all", 0)
    assert {parameter.dtype for parameter in trained_parameters(student).values()} == {torch.float32}
    assert "lm_head.weight" not in trained_parameters(student)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert trained_parameters(student).keys() == dict(module.named_parameters()).keys()


def test_weights_of_the_layers_are_all_but_embeddings_and_unembedding(any_architecture: str) -> None:
    model = PrunableModel.of(tiny_model(any_architecture))
    names = set(trained_names(model, "layers"))
    left = {name: parameter for name, parameter in model.module.named_parameters() if name not in names}
    of_decoder = [name for name in left if not name.startswith(("model.vision", "model.multi_modal"))]
    assert all("embed" in name or name.startswith("lm_head.") for name in of_decoder)
    assert model.head.weight.data_ptr() in {parameter.data_ptr() for parameter in left.values()}
    assert {name for name in names if "layers" in name} >= set(norms_and_outputs(model)) - {
        f"{model.family.final_norm}.weight",
        f"{model.family.final_norm}.bias",
    }


def test_a_student_is_loaded_in_float32_if_most_of_it_is_trained() -> None:
    loaded = {train: loaded_dtype(train, bfloat16=True) for train in get_args(Trained)}
    assert loaded == {"all": "float32", "layers": "float32", "lora": "auto", "norms-and-outputs": "auto"}
    assert {loaded_dtype(train, bfloat16=False) for train in get_args(Trained)} == {"float32"}


def test_weights_that_are_not_trained_keep_their_dtype() -> None:
    model = PrunableModel.of(tiny_model("llama-gqa").to(torch.bfloat16))
    student = trainable(model, "norms-and-outputs", 0)
    trained = trained_parameters(student)
    assert trained.keys() == set(norms_and_outputs(model))
    for name, parameter in student.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16)


@pytest.mark.parametrize("architecture", ["llama-gqa", "llama-biased", "phi3", "qwen3_5_text"])
def test_merged_adapters_give_the_logits_of_the_adapted_model(architecture: str) -> None:
    pytest.importorskip("peft", reason="needs the extra: pip install 'pgprune[recovery]'")
    torch.manual_seed(0)
    student = trainable(PrunableModel.of(tiny_model(architecture)), "lora", 2)
    with torch.no_grad():
        for parameter in trained_parameters(student).values():  # half of an adapter begins at zero
            parameter.normal_(std=0.1)
        adapted = student(input_ids=TOKENS).logits
        plain = tiny_model(architecture)
        assert not torch.allclose(plain(input_ids=TOKENS).logits, adapted, atol=1e-2)
        merged = trained_tensors(student)
        parameters = dict(plain.named_parameters())
        assert merged.keys() <= parameters.keys()
        for name, weight in merged.items():
            parameters[name].copy_(weight)
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, adapted, atol=1e-4, rtol=1e-4)
