"""Names of stored tensors: whatever transformers loads is also loaded in 8 bits and exported, and is the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.exports import export
from helpers.masks import dense_mask
from helpers.messages import refused
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, save_shards, save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pgprune_cli.jobs.doctor import doctor
from pgprune_cli.jobs.estimate import estimate
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import check_prunable, load_model, load_prunable
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load

TOKENS = torch.randint(6, 96, (2, 20), generator=torch.Generator().manual_seed(0))
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from an architecture to a saved model, whose files must not change."""
    made: dict[str, Path] = {}

    def base(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("base") / "model"
            tiny_model(architecture).save_pretrained(made[architecture])
            save_tokenizer(made[architecture])
        return made[architecture]

    return base


def rewrite(source: Path, target: Path, edit: Callable[[Tensors], Tensors], **config: object) -> Path:
    """Copy a model with other tensors and other keys of its config."""
    shutil.copytree(source, target)
    tensors = edit(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


NAMES = {
    "no prefix": lambda name: name.removeprefix("model."),
    "two prefixes": lambda name: f"model.{name}",
    "two prefixes but the head": lambda name: f"model.{name}" if name.startswith("model.") else name,
}
"""Names that transformers reads."""


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def computes(base: Path, out: Path, expected: Tensor) -> None:
    """Fail unless all readers of `base` read the same model, which has the logits `expected`."""
    check_prunable(resolve(str(base)))
    whole = load_model(resolve(str(base)), "auto", "cpu")
    assert torch.equal(logits(whole), expected)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(base)), expected)
    export(base, out, dense_mask(whole))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
    before, after = (model.state_dict() for model in (whole, load_model(resolve(str(out)), "auto", "cpu")))
    assert all(torch.equal(before[name], after[name]) for name in before)


def quantized_alike(base: Path, original: Path) -> None:
    """Fail unless both are the same model in 8 bits."""
    models = [load_prunable(resolve(str(path)), "auto", "cpu", "int8").module for path in (base, original)]
    assert torch.equal(*map(logits, models))


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("architecture", ["llama-mha", "qwen3", "gemma3_text", "mixtral"])
def test_names_that_transformers_reads_are_searched_and_exported(
    names: str, architecture: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    original = bases(architecture)
    base = rewrite(original, tmp_path / "base", renamed(NAMES[names]))
    computes(base, tmp_path / "out", logits(load_model(resolve(str(original)), "auto", "cpu")))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(original / "model.safetensors").keys()
    if architecture != "mixtral":  # experts are not searched in 8 bits
        quantized_alike(base, original)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERT_ARCHITECTURES])
def test_names_without_the_prefix_are_complete_in_every_family(
    architecture: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    check_prunable(resolve(str(rewrite(bases(architecture), tmp_path / "base", renamed(NAMES["no prefix"])))))


def test_a_decoder_with_the_names_of_its_wrapper_is_searched_and_exported(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    original = bases("qwen3_5_text")
    base = rewrite(
        original, tmp_path / "base", renamed(lambda name: name.replace("model.", "model.language_model.", 1))
    )
    computes(base, tmp_path / "out", logits(load_model(resolve(str(original)), "auto", "cpu")))
    quantized_alike(base, original)


def test_every_dtype_of_plain_floats_is_searched_and_exported_as_it_is(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    dtypes = dict(zip(FLOATS, [torch.float64, torch.float16, torch.bfloat16], strict=True))
    base = rewrite(
        bases("llama-gqa"),
        tmp_path / "base",
        lambda tensors: {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()},
    )
    computes(base, tmp_path / "out", logits(load_model(resolve(str(base)), "auto", "cpu")))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert {after[name].dtype for name in FLOATS} == set(dtypes.values())


FLOATS = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")


# --- tied weights


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma"])
def test_tied_weights_of_which_only_the_head_is_stored_are_searched_and_exported(
    architecture: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    original, base = bases(architecture), tmp_path / "base"
    shutil.copytree(original, base)
    save_model(tiny_model(architecture), str(base / "model.safetensors"), metadata={"format": "pt"})
    if "lm_head.weight" not in load_file(base / "model.safetensors"):  # the library keeps either
        base = rewrite(original, tmp_path / "head", renamed(lambda name: HEAD.get(name, name)))
    computes(base, tmp_path / "out", logits(load_model(resolve(str(original)), "auto", "cpu")))
    quantized_alike(base, original)


HEAD = {"model.embed_tokens.weight": "lm_head.weight"}


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_tied_weights_that_are_both_stored_are_tied_if_they_are_equal(
    scale: float, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    def stored_twice(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * scale}

    original = bases("llama-gqa")
    base = rewrite(original, tmp_path / "base", stored_twice)
    whole = load_model(resolve(str(original)), "auto", "cpu")
    computes(base, tmp_path / "out", logits(whole) * scale)
    full, small = (load_model(resolve(str(base)), "auto", "cpu", kind) for kind in ("full", "int8"))
    assert torch.equal(full.lm_head.weight, small.lm_head.weight)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == (scale == 1.0)


# --- what is refused

INCOMPLETE: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "no head": ("llama-mha", without("lm_head.weight"), "has no lm_head.weight"),
    "no layer": ("llama-mha", without("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
    "names of PEFT": ("llama-mha", renamed(lambda name: f"base_model.model.{name}"), "embed_tokens.weight is missing"),
    "wrapper names": (
        "llama-mha",
        renamed(lambda name: f"language_model.{name}"),
        "embed_tokens.weight is missing",
    ),
    "an expert's part": (
        "mixtral",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "experts.3.w2" not in name},
        "of part 0 of expert 3 of model.layers.0.mlp.experts.down_proj is missing",
    ),
    "an adapter": (
        "llama-mha",
        renamed(lambda name: name.replace("q_proj.weight", "q_proj.lora_A.weight")),
        "layers.0.self_attn.q_proj.weight is missing, because an adapter is not merged into it",
    ),
    "integers": (
        "llama-mha",
        lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)},
        "lm_head.weight has the dtype I8",
    ),
    "a name twice": (
        "llama-mha",
        lambda tensors: tensors | {"embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1},
        "holds the tensor model.embed_tokens.weight twice in model.safetensors. ",
    ),
}


def refused_everywhere(base: Path, tmp_path: Path, *facts: str) -> None:
    """Fail unless everything that begins with a model refuses it before it reads text or weights."""
    recipe = load(find("demo"), [f"model={base}"])
    for verb in (init_scores, search):
        with refused(*facts):
            verb(recipe, tmp_path / "run")
    with refused(*facts):
        estimate(recipe)
    [finding] = [each for each in doctor(recipe) if each.name == "model"]
    assert finding.status == "FAIL" and facts[0] in str(finding)


@pytest.mark.parametrize("case", INCOMPLETE)
def test_what_cannot_be_exported_is_refused_before_the_search(
    case: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    architecture, edit, fact = INCOMPLETE[case]
    base = rewrite(bases(architecture), tmp_path / "base", edit)
    refused_everywhere(base, tmp_path, fact)


def test_a_missing_shard_and_a_tensor_missing_in_all_shards_are_refused_before_the_search(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = save_shards(rewrite(bases("llama-mha"), tmp_path / "base", without("model.norm.weight")))
    refused_everywhere(base, tmp_path, "model.norm.weight is missing")
    (base / "one.safetensors").unlink()
    refused_everywhere(base, tmp_path, "one.safetensors: missing")


def test_a_tensor_in_two_files_is_refused_with_the_names_of_both(bases: Callable[[str], Path], tmp_path: Path) -> None:
    name = "layers.3.mlp.up_proj.weight"  # sorted by name, it is in another shard than its double
    full = f"model.{name}"
    base = rewrite(bases("llama-mha"), tmp_path / "base", lambda tensors: tensors | {name: tensors[full].clone()})
    refused_everywhere(
        save_shards(base), tmp_path, f"holds the tensor {full} twice, in ", "two.safetensors", "one.safetensors"
    )


def test_pickled_weights_are_refused_before_the_search(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases("llama-mha"), tmp_path / "base"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refused_everywhere(base, tmp_path, "neither model.safetensors nor")


# --- adapters

ADAPTER = '{"base_model_name_or_path": "owner/other", "peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}'


def test_a_merged_model_with_the_config_of_its_adapter_is_searched_and_exported(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    original = bases("llama-gqa")
    base = Path(shutil.copytree(original, tmp_path / "base"))
    (base / "adapter_config.json").write_text(ADAPTER)
    check_prunable(resolve(str(base)))
    expected = logits(load_model(resolve(str(original)), "auto", "cpu"))
    assert torch.equal(logits(load_model(resolve(str(base)), "auto", "cpu")), expected)
    quantized_alike(base, original)
    export(base, tmp_path / "out", dense_mask(tiny_model("llama-gqa")))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_an_adapter_alone_and_an_adapter_beside_a_whole_model_are_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases("llama-gqa"), tmp_path / "base"))
    (base / "adapter_config.json").write_text(ADAPTER)
    (base / "adapter_model.safetensors").touch()
    refused_everywhere(base, tmp_path, "a whole model and the weights of an adapter", "adapter_model.safetensors")
    (base / "model.safetensors").unlink()
    refused_everywhere(base, tmp_path, "holds an adapter for owner/other, not a whole model")
    (base / "config.json").unlink()
    refused_everywhere(base, tmp_path, "holds an adapter for owner/other, not a whole model")
