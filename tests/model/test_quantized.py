"""Weights in one byte: how they are rounded, that every reader sees the rounded ones, and how they are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.exports import DECISIONS
from helpers.exports import export as export_model
from helpers.fp8 import rounded_product, slowly_rounded
from helpers.masks import MODEL_MASKS, dense_mask, draw, logits_of, random_repair, random_tokens
from helpers.memory import Allocations
from helpers.messages import refused, says
from helpers.models import save_tokenizer, tiny_model
from helpers.recipes import WIDTH_SEARCH
from helpers.units import chain_units, group_units, ranks_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pgprune_cli.errors import UserError
from pgprune_cli.export import gguf
from pgprune_cli.export.plan import Options
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.estimate import estimate
from pgprune_cli.jobs.export import export, options_of
from pgprune_cli.jobs.search import search
from pgprune_cli.model import loading, quantized, weights
from pgprune_cli.model.families.llama import LLAMA
from pgprune_cli.model.loading import WeightFormat, empty_model, load_model, load_prunable
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import (
    FP8,
    Fp8Linear,
    Int8Linear,
    QuantizedLinear,
    check_fp8,
    fp8_product,
    quantize_projections,
)
from pgprune_cli.model.source import DEMO_MODEL, INDEX, resolve
from pgprune_cli.model.unit_tensors import kept_shape
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.repair.width_table import WidthTable, solve_layers
from pgprune_cli.run.decision import Decision
from pgprune_cli.scores.metrics import score
from pgprune_cli.search.costs import measure_latency

TEXT = [random_tokens(seed, rows=4, length=16) for seed in (0, 1)]


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


CLASSES: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "fp8": Fp8Linear}


def linears_of(model: PrunableModel) -> list[nn.Linear]:
    """Return the prunable linear layers of every decoder layer."""
    return [linear for layer in model.layers for _, _, linear in model.family.linears(layer)]


class StrictScaledMM:
    """torch's product of fp8 matrices, which also refuses what a GPU refuses: sizes, layouts and kinds of scales."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.original = 0, nn.functional.scaled_mm
        monkeypatch.setattr(quantized.functional, "scaled_mm", self)

    def __call__(self, a: Tensor, b: Tensor, scale_a: Tensor, by_a, scale_b: Tensor, by_b, **options) -> Tensor:
        self.calls += 1
        assert a.dtype == b.dtype == FP8 and a.shape[1] % 16 == b.shape[1] % 16 == 0
        assert a.is_contiguous() and b.t().is_contiguous()
        for scale, shape in ((scale_a, (len(a), 1)), (scale_b, (1, b.shape[1]))):
            assert scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous()
        return self.original(a, b, scale_a, by_a, scale_b, by_b, **options)


@pytest.fixture
def scaled_mm(monkeypatch: pytest.MonkeyPatch) -> StrictScaledMM:
    return StrictScaledMM(monkeypatch)


@pytest.fixture
def pair(architecture: str) -> tuple[PrunableModel, PrunableModel]:
    """An int8 model, and an ordinary one with the same rounded weights."""
    int8, twin = tiny_model(architecture), tiny_model(architecture)
    quantize_projections(int8, "int8")
    for linear in linears_of(PrunableModel.of(twin)):
        linear.weight.data = Int8Linear(linear).weight
    return PrunableModel.of(int8), PrunableModel.of(twin)


def fp8_pair() -> tuple[PrunableModel, PrunableModel]:
    """Return an ordinary model and the same in fp8."""
    plain, fp8 = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    quantize_projections(fp8, "fp8")
    return PrunableModel.of(plain), PrunableModel.of(fp8)


# --- rounding


@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_int8_error_is_at_most_half_a_step(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(7, 33, generator=generator) * torch.logspace(-1, 1, 7)[:, None]).to(dtype)
    weight[3] = 0.0
    before = weight.clone()
    linear = Int8Linear(linear_of(weight))
    assert torch.equal(weight, before)
    assert linear.values.dtype == torch.int8 and int(linear.values.min()) >= -127
    largest = weight.double().abs().amax(1, keepdim=True)
    # The scale is rounded to the dtype, so the largest weight may exceed the last step. The product is rounded too.
    allowed = largest * (0.5 / 127 + 2 * torch.finfo(dtype).eps)
    assert linear.weight.dtype == dtype
    assert ((linear.weight.double() - weight.double()).abs() <= allowed).all()
    assert not linear.weight[3].any()


@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_fp8_error_is_at_most_a_sixteenth_or_half_of_the_smallest_step(seed: int, dtype: torch.dtype) -> None:
    """e4m3 has 3 bits after the leading one for numbers down to 2⁻⁶, and steps of 2⁻⁹ below."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(300, 33, generator=generator) * torch.logspace(-3, 1, 300)[:, None]).to(dtype)
    weight[3] = 0.0
    linear = Fp8Linear(linear_of(weight))
    allowed = torch.maximum(weight.double().abs() / 16, linear.scale.double() * 2.0**-10)
    allowed += torch.finfo(dtype).eps * (weight.double().abs() + torch.finfo(dtype).smallest_normal)
    assert linear.weight.dtype == dtype and linear.values.element_size() == 1
    assert ((linear.weight.double() - weight.double()).abs() <= allowed).all()
    largest = weight.abs().amax(1)
    torch.testing.assert_close(linear.weight.abs().amax(1), largest, rtol=torch.finfo(dtype).eps, atol=0)
    assert not linear.weight[3].any()


@given(
    rows=st.integers(1, 5),
    inner=st.integers(1, 40),
    out=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fp8_product_equals_that_of_rounded_inputs_and_weights(
    rows: int, inner: int, out: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs = (torch.randn(2, rows, inner, generator=generator) * 5).to(dtype)
    inputs[0, 0], inputs[1, 0] = 0.0, inputs[1, 0] * 100
    linear = Fp8Linear(linear_of(torch.randn(out, inner, generator=generator, dtype=dtype)))
    with pytest.MonkeyPatch.context() as patch:
        scaled_mm = StrictScaledMM(patch)
        product = fp8_product(inputs, linear.values, linear.scale)
    assert scaled_mm.calls == 1 and product.dtype == dtype and product.shape == (2, rows, out)
    expected = rounded_product(inputs, linear.values, linear.scale)
    torch.testing.assert_close(
        product.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * float(expected.abs().max())
    )
    assert not product[0, 0].any() and product.isfinite().all()


def test_a_device_that_cannot_multiply_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("only supported on CUDA devices with compute capability >= 8.9\nand more")

    check_fp8(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(quantized.functional, "scaled_mm", fails)
    with refused("weight_format: cpu", "bfloat16", "int8 or full", "compute capability >= 8.9 and more"):
        load_model(resolve("demo"), "bfloat16", "cpu", "fp8")
    with refused("weight_format: cpu", "float32", "Set dtype to bfloat16, or weight_format to int8"):
        check_fp8(torch.device("cpu"), torch.float32)


def test_a_pytorch_without_fp8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(quantized.functional, "scaled_mm")
    with pytest.raises(UserError, match=rf"^weight_format: PyTorch {re.escape(torch.__version__)} is too old for fp8"):
        check_fp8(torch.device("cpu"), torch.float32)


def test_weights_on_the_steps_are_not_changed() -> None:
    steps = torch.tensor([[127.0, -127.0, 3.0, 0.0], [1.0, 127.0, -5.0, 2.0]])
    weight = steps * torch.tensor([[0.5], [0.25]])
    linear = Int8Linear(linear_of(weight))
    assert torch.equal(linear.values.float(), steps)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.scale, torch.tensor([[0.5], [0.25]]))


def test_int8_forward_pass_uses_the_rounded_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = linear_of(torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator))
    inputs = torch.randn(3, 5, generator=generator)
    int8 = Int8Linear(linear)
    assert torch.equal(int8(inputs), nn.functional.linear(inputs, int8.weight, linear.bias))
    assert 0 < (int8(inputs) - linear(inputs)).abs().max() < 0.1


# --- readers of weights


@pytest.mark.parametrize("name", MODEL_MASKS)
def test_shrunk_model_uses_the_rounded_weights(pair, name: str) -> None:
    model, twin = pair
    model_mask, tokens = MODEL_MASKS[name](twin.module), random_tokens()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    dense = logits_of(model.module, tokens)
    for repaired in ({}, random_repair(twin.module, model_mask, bias=True)):
        with (
            Evaluator(model).shrunk(model_mask, repaired) as shrunk,
            Evaluator(twin).shrunk(model_mask, repaired) as expected,
        ):
            torch.testing.assert_close(logits_of(shrunk, tokens), logits_of(expected, tokens), rtol=1e-5, atol=1e-5)
    after = model.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits_of(model.module, tokens), dense)
    torch.testing.assert_close(dense, logits_of(twin.module, tokens), rtol=1e-5, atol=1e-5)


def test_a_failed_forward_pass_leaves_the_model_unchanged(pair) -> None:
    model, _ = pair
    dense = logits_of(model.module, random_tokens())

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.family.ffn.output_linear(model.layers[3]).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Evaluator(model).losses([MODEL_MASKS["random"](model.module)], random_tokens())
    handle.remove()
    assert torch.equal(logits_of(model.module, random_tokens()), dense)
    assert all(linear.kept is None for linear in linears_of(model))


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs", "magnitude"])
def test_scores_are_those_of_the_rounded_weights(pair, metric: str) -> None:
    scores, expected = (score(model, metric, TEXT, 0) for model in pair)
    assert scores.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(scores[key], expected[key], rtol=1e-4, atol=1e-6)


def test_width_table_is_that_of_the_rounded_weights(pair) -> None:
    _, units = chain_units(pair[0].shape)
    ranks = ranks_of(pair[0].shape, units)
    table, expected = (
        WidthTable.of(model, dict(solve_layers(model, ranks, units, TEXT, 1e-2, solve=True))) for model in pair
    )
    for key in ranks:
        torch.testing.assert_close(table.errors[key], expected.errors[key], rtol=1e-3, atol=1e-6)
        for width, output in expected.repaired[key].items():
            torch.testing.assert_close(table.repaired[key][width].weight, output.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["bias", "least-squares", "least-squares-bias"])
def test_repair_is_fitted_to_the_rounded_weights(pair, method: str) -> None:
    repaired, expected = (repair(model, MODEL_MASKS["random"](model.module), TEXT, method, 1e-2) for model in pair)
    assert repaired.blocks.keys() == expected.blocks.keys()
    for key, output in expected.blocks.items():
        torch.testing.assert_close(repaired.blocks[key].weight, output.weight, rtol=1e-3, atol=1e-3)


def test_shape_and_parameter_counts_do_not_change(pair) -> None:
    model, twin = pair
    assert model.shape == twin.shape


def test_latency_excludes_the_conversion_of_weights(pair) -> None:
    """Whenever the clock is read, the weights of the timed block, full or halved, have been converted."""
    model, _ = pair
    linears = linears_of(model)
    converted: list[list[bool]] = []

    def clock(_: torch.device) -> int:
        converted.append([linear.kept is not None for linear in linears])
        return len(converted)

    measure_latency(model, 8, clock)
    assert converted and all(any(reading) for reading in converted)


def test_an_evaluation_converts_the_weights_of_one_block_at_a_time() -> None:
    module = tiny_model("llama-mha")
    block = max(sum(p.nbytes for p in part.parameters()) for part in module.model.layers[0].children())
    layers = sum(p.nbytes for p in module.model.layers.parameters())
    model_masks = [MODEL_MASKS["dense"](module), MODEL_MASKS["random"](module)]
    quantize_projections(module, "int8")
    evaluator, tokens = Evaluator(PrunableModel.of(module)), random_tokens()[:1, :4]
    with Allocations() as allocations:
        evaluator.losses(model_masks, tokens)
    assert allocations.peak < 1.25 * block + 8_000 < layers / 2


# --- fp8: a single input that is rounded differently changes everything after it, so products are compared one by one


@pytest.mark.parametrize("name", MODEL_MASKS)
def test_every_product_of_a_shrunk_fp8_model_uses_rounded_inputs_and_weights(
    architecture: str, name: str, scaled_mm: StrictScaledMM
) -> None:
    module, tokens = tiny_model(architecture), random_tokens()
    model_mask = MODEL_MASKS[name](module)
    repairs = [{}, random_repair(module, model_mask, bias=True)]
    expected = Evaluator(PrunableModel.of(module)).losses([model_mask] * 2, tokens, repairs)
    quantize_projections(module, "fp8")
    model = PrunableModel.of(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    shapes = []

    def check(linear: Fp8Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        rows = inputs[0].flatten(0, -2)
        if not isinstance(linear.kept, Tensor):
            rows = torch.stack([slowly_rounded(row) for row in rows])
        product = nn.functional.linear(rows, linear.weight, linear.bias).view(output.shape)
        torch.testing.assert_close(output, product, rtol=1e-4, atol=1e-5)
        shapes.append(linear.weight.shape)

    for linear in linears_of(model):
        linear.register_forward_hook(check)
    torch.testing.assert_close(Evaluator(model).losses([model_mask] * 2, tokens, repairs), expected, rtol=0.06, atol=0)
    expected_shapes = list(shapes_of_running_projections(model, model_mask))
    assert shapes == expected_shapes * 2
    paths = [
        (index, f"{block.module}.{name}.weight")
        for index, layer in enumerate(model.layers)
        for block, name, _ in model.family.linears(layer)
    ]
    repaired = repairs[1]
    refitted = {
        (index, f"{model.shape.blocks[index][block].module}.{name}")
        for (index, block), own in repaired.items()
        for name in own.inner
    }
    assert scaled_mm.calls == 2 * len(expected_shapes) - len(repaired) - len(refitted & set(paths))
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def shapes_of_running_projections(model: PrunableModel, model_mask: ModelMask) -> Iterator[torch.Size]:
    """Yield the shape of the weight of every projection that runs."""
    for layer, layer_mask in zip(model.layers, model_mask, strict=True):
        for block in model.family.blocks_of(layer):
            mask, module = layer_mask.of(block.name), layer.get_submodule(block.module)
            for tensor in model.family.unit_tensors(layer, block) if mask.any() else ():
                linear = module.get_submodule(tensor.module)
                if tensor.key == "weight" and isinstance(linear, nn.Linear):
                    yield kept_shape(tensor, linear.weight.shape, mask)


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs"])
def test_fp8_scores_are_close_to_those_of_the_original_weights(metric: str) -> None:
    plain, fp8 = fp8_pair()
    scores = score(fp8, metric, TEXT, 0)
    for key, expected in score(plain, metric, TEXT, 0).items():
        assert not torch.equal(scores[key], expected)
        if key.endswith("ffn"):  # 8 query heads are too few and too similar for a correlation
            assert float(torch.corrcoef(torch.stack([scores[key], expected]))[0, 1]) > 0.9


def test_fp8_repair_is_nearly_as_good_as_one_on_the_original_weights() -> None:
    plain, fp8 = fp8_pair()
    model_mask, heldout = MODEL_MASKS["random"](plain.module), random_tokens(9, rows=8)
    losses = []
    for model in (plain, fp8):
        repaired = repair(model, model_mask, TEXT, "least-squares", 1e-2).blocks
        losses.append(float(Evaluator(plain).losses([model_mask], heldout, [repaired])))
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[1] != losses[0]


# --- loading


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    parameters = dict(expected.named_parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters())
    assert torch.equal(logits_of(model, random_tokens()), logits_of(expected, random_tokens()))


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_loading_equals_rounding_a_loaded_model(
    architecture: str, dtype: str, weight_format: WeightFormat, tmp_path: Path
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    expected = load_model(resolve(str(tmp_path)), dtype, "cpu")
    quantize_projections(expected, weight_format)
    model = load_model(resolve(str(tmp_path)), dtype, "cpu", weight_format)
    assert_same(model, expected)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    empty = empty_model(str(tmp_path), dtype, weight_format).module
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()
    ]


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_layers_with_unequal_heads_have_the_rope_of_the_dense_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
    model.config.rope_parameters = rope
    model.save_pretrained(tmp_path / "base")
    export_model(tmp_path / "base", tmp_path / "out", draw(model, DECISIONS["mixed sizes"]))
    expected = load_model(resolve(str(tmp_path / "out")), "float32", "cpu")
    quantize_projections(expected, "int8")
    assert_same(load_model(resolve(str(tmp_path / "out")), "float32", "cpu", "int8"), expected)


def test_loading_reads_shards_and_ignores_tensors_of_old_files(damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    expected = load_model(resolve(str(damaged)), "float32", "cpu", "int8")
    (damaged / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"two.safetensors": names[::2], "one.safetensors": names[1::2]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, damaged / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (damaged / INDEX).write_text(json.dumps(index))
    assert_same(load_model(resolve(str(damaged)), "float32", "cpu", "int8"), expected)


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_is_tied_only_if_it_equals_the_embedding(differs: bool, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + differs
    save_file(tensors | {LLAMA.head_weight: head.clone()}, damaged / "model.safetensors", metadata={"format": "pt"})
    expected = load_model(resolve(str(damaged)), "float32", "cpu")
    quantize_projections(expected, "int8")
    model = load_model(resolve(str(damaged)), "float32", "cpu", "int8")
    assert_same(model, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not differs


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_a_gguf_file_is_rounded_after_unpacking(weight_format: WeightFormat, tmp_path: Path) -> None:
    tiny_model("llama-mha").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    source = resolve(str(tmp_path / "dense"))
    model_mask = dense_mask(tiny_model("llama-mha"))
    decision = Decision(model_mask, str(tmp_path), source.fingerprint(), 0.0, "dtype: float32\n", 0, 0, 0, None)
    gguf.plan(source, decision, Options(ShapeRequirements(), "float32")).write(tmp_path / "dense.gguf", lambda _: None)
    unpacked = resolve(str(tmp_path / "dense.gguf"))
    assert_same(
        load_model(unpacked, "float32", "cpu", weight_format), load_model(source, "float32", "cpu", weight_format)
    )


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_loading_never_holds_the_model_in_another_form_than_one_byte(
    weight_format: WeightFormat, tmp_path: Path
) -> None:
    """Of 72 projections, only one at a time exists in another form."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    with Allocations() as allocations:
        model = load_model(source, "bfloat16", "cpu", weight_format)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    largest = 64 * 256 * (4 + 2 + 2 + 1)  # as read, its magnitudes, in float32, and in one byte
    assert kept < allocations.peak < kept + largest + 10_000 < 0.75 * 2 * sum(p.numel() for p in model.parameters())


def test_damaged_files_are_refused_as_without_rounding(damaged: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path, tensors = damaged / "model.safetensors", load_file(damaged / "model.safetensors")

    def error_with(tensors: dict[str, Tensor], weight_format: WeightFormat = "int8") -> str:
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UserError) as caught:
            load_model(resolve(str(damaged)), "float32", "cpu", weight_format)
        return str(caught.value)

    for broken, facts in (
        ({key: value for key, value in tensors.items() if key != name}, ("1 weight is missing", name)),
        (tensors | {name: tensors[name][:5].clone()}, (name, "(5, 32)", "(24, 32)")),
    ):
        says(error_with(broken), str(damaged), *facts)
        assert error_with(broken) == error_with(broken, "full")
    for bad in (torch.nan, torch.inf):
        weight = tensors[name].clone()
        weight[3, 5] = bad
        says(error_with(tensors | {name: weight}), "model.layers.1.mlp.up_proj.scale", "NaN or infinity")
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(UserError, match="damaged or not safetensors"):
        load_model(resolve(str(damaged)), "float32", "cpu", "int8")


def test_several_devices_give_the_same_losses_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All devices are the CPU, but accelerate's hooks are active."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[multi-gpu]'")
    dispatch = accelerate.dispatch_model
    monkeypatch.setattr(accelerate, "dispatch_model", lambda *arguments: dispatch(*arguments, force_hooks=True))
    single = load_prunable(resolve("demo"), "float32", "cpu", "int8")
    monkeypatch.setattr(loading, "devices_of", lambda _: [torch.device("cpu")] * 2)
    hooked = load_prunable(resolve("demo"), "float32", "cpu,cpu", "int8")
    assert all(hasattr(layer, "_hf_hook") for layer in hooked.layers)
    space, units = group_units(single.shape)
    model_mask = single.shape.model_mask(space, torch.arange(space.n) % 3 > 0, units)
    tokens = torch.arange(48).view(2, 24)
    assert torch.equal(Evaluator(hooked).losses([model_mask], tokens), Evaluator(single).losses([model_mask], tokens))
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with refused("several devices", "accelerate", "pip install 'pgprune[multi-gpu]'"):
        load_model(resolve("demo"), "float32", "cpu,cpu", "int8")


# --- jobs with rounded weights


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_a_search_repairs_rounded_weights_and_exports_original_ones(weight_format: str, small, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = small(*WIDTH_SEARCH, "dtype=float32", f"weight_format={weight_format}", "calibration.windows=24")
    decision: Decision = search(recipe, run)
    plain = search(small(*WIDTH_SEARCH, "dtype=float32", "calibration.windows=24"), tmp_path / "plain")
    assert decision.heldout_loss == pytest.approx(plain.heldout_loss, rel=0.05)
    assert decision.heldout_loss != plain.heldout_loss
    export(run, tmp_path / "model", options_of("hf", dtype="float32"))
    layer = next(index for index, mask in enumerate(decision.model_mask) if mask.ffn.any() and not mask.ffn.all())
    name = f"model.layers.{layer}.mlp.gate_proj.weight"
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as base:
        original = base.get_tensor(name).float()[decision.model_mask[layer].ffn]
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert any(torch.equal(value, original) for key, value in tensors.items() if key.endswith("mlp.gate_proj.weight"))


def test_estimate_counts_rounded_weights(small) -> None:
    plain, int8, fp8 = (
        estimate(small("dtype=bfloat16", f"weight_format={weight_format}")) for weight_format in ("full", *CLASSES)
    )
    assert int8["parameters"] == fp8["parameters"] == plain["parameters"]
    # the scales of fp8 are wider
    assert int8["memory"]["weights"] < fp8["memory"]["weights"] < 1.1 * int8["memory"]["weights"]
    assert fp8["memory"]["slices"] < plain["memory"]["slices"] < int8["memory"]["slices"]
    saved_bytes = 2 * plain["parameters"] - int8["memory"]["weights"]
    matrices = [p for p in empty_model("demo", "bfloat16").layers.parameters() if p.dim() == 2]
    assert saved_bytes == pytest.approx(sum(matrix.numel() for matrix in matrices), rel=0.02)
