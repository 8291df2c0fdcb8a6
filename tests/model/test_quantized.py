"""WeightFormat in 8 bits: how they are rounded, that whatever reads them reads the rounded ones, and how they are loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.masks import MODEL_MASKS, logits_of, some_outputs, some_tokens
from helpers.memory import Allocations
from helpers.models import save_tokenizer, tiny_model
from helpers.recipes import WIDTH_SEARCH
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
from pgprune_cli.jobs.compare import compare
from pgprune_cli.jobs.estimate import estimate
from pgprune_cli.jobs.export import export, options_of
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.model import loading
from pgprune_cli.model import quantized as eight_bit
from pgprune_cli.model.families.adapter import Projection, gather_units
from pgprune_cli.model.loading import HEAD, WeightFormat, empty_model, load_model
from pgprune_cli.model.masks import LayerMask, ModelMask, Output, Outputs
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import FP8, Fp8Linear, Int8Linear, check_fp8, fp8_product, quantize_projections
from pgprune_cli.model.source import DEMO_MODEL, INDEX, resolve
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.repair.width_table import WidthTable, solve_layers
from pgprune_cli.run.decision import Decision
from pgprune_cli.scores.metrics import score
from pgprune_cli.search.costs import measure_latency

TEXT = [some_tokens(seed, rows=4, length=16) for seed in (0, 1)]


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


KINDS = {"int8": Int8Linear, "fp8": Fp8Linear}


def slowly_rounded(row: Tensor) -> Tensor:
    least = torch.tensor([torch.finfo(torch.float32).smallest_normal])
    scale = torch.maximum(row.float().abs().max() / torch.tensor([448.0]), least)
    return (row.float() / scale).to(FP8).float().mul(scale).to(row.dtype)


def rounded(model: nn.Module) -> nn.Module:
    """The same weights as the int8 model has, in an ordinary one."""
    spec, model = PrunableModel.of(model).shape.spec, copy.deepcopy(model)
    for layer in model.get_submodule(spec.layers):
        for _, _, linear in projections(spec, layer):
            linear.weight.data = Int8Linear(linear).weight
    return model


class LikeAChip:
    """torch's product of fp8 matrices, refusing what a GPU refuses: sizes, layouts and scales of other kinds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.known = 0, nn.functional.scaled_mm
        monkeypatch.setattr(eight_bit.functional, "scaled_mm", self)

    def __call__(self, a: Tensor, b: Tensor, scale_a: Tensor, by_a, scale_b: Tensor, by_b, **others) -> Tensor:
        self.calls += 1
        assert a.dtype == b.dtype == FP8 and a.shape[1] % 16 == b.shape[1] % 16 == 0
        assert a.is_contiguous() and b.t().is_contiguous()
        for scale, shape in ((scale_a, (len(a), 1)), (scale_b, (1, b.shape[1]))):
            assert scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous()
        return self.known(a, b, scale_a, by_a, scale_b, by_b, **others)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> LikeAChip:
    return LikeAChip(monkeypatch)


@pytest.fixture
def pair(architecture: str) -> tuple[nn.Module, nn.Module]:
    """An int8 model and its ordinary twin."""
    model = tiny_model(architecture)
    twin = rounded(model)
    quantize_projections(model, "int8")
    return model, twin


# --- rounding


@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(7, 33, generator=generator) * torch.logspace(-1, 1, 7)[:, None]).to(dtype)
    weight[3] = 0.0
    before = weight.clone()
    linear = Int8Linear(linear_of(weight))
    assert torch.equal(weight, before)
    assert linear.values.dtype == torch.int8 and int(linear.values.min()) >= -127
    largest = weight.double().abs().amax(1, keepdim=True)
    # The scale is rounded to the dtype, so the largest weight may lie beyond the last step; the product is, too.
    allowed = largest * (0.5 / 127 + 2 * torch.finfo(dtype).eps)
    assert linear.weight.dtype == dtype
    assert ((linear.weight.double() - weight.double()).abs() <= allowed).all()
    assert not linear.weight[3].any()


@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_fp8_is_off_by_a_sixteenth_or_half_of_its_smallest_step(seed: int, dtype: torch.dtype) -> None:
    """e4m3 has 3 bits behind the leading one, down to 2⁻⁶, and steps of 2⁻⁹ below."""
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
def test_a_product_is_that_of_both_rounded(rows: int, inner: int, out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs = (torch.randn(2, rows, inner, generator=generator) * 5).to(dtype)
    inputs[0, 0], inputs[1, 0] = 0.0, inputs[1, 0] * 100
    linear = Fp8Linear(linear_of(torch.randn(out, inner, generator=generator, dtype=dtype)))
    with pytest.MonkeyPatch.context() as patch:
        chip = LikeAChip(patch)
        found = fp8_product(inputs, linear.values, linear.scale)
    assert chip.calls == 1 and found.dtype == dtype and found.shape == (2, rows, out)
    both = torch.stack([slowly_rounded(row.float()) for row in inputs.flatten(0, 1)])
    expected = (both @ (linear.values.view(FP8).float() * linear.scale).t()).view(found.shape)
    torch.testing.assert_close(
        found.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * float(expected.abs().max())
    )
    assert not found[0, 0].any() and found.isfinite().all()


def test_a_chip_without_such_products_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("only supported on CUDA devices with compute capability >= 8.9\nand more")

    check_fp8(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(eight_bit.functional, "scaled_mm", fails)
    with pytest.raises(UserError) as caught:
        load_model(resolve("demo"), "bfloat16", "cpu", "fp8")
    assert str(caught.value) == (
        "weights: cpu multiplies no fp8 in bfloat16; set weights to int8 or dtype (only supported on CUDA devices with "
        "compute capability >= 8.9 and more)"
    )
    with pytest.raises(
        UserError, match="multiplies no fp8 in float32; set dtype to bfloat16, or weights to int8 or dtype"
    ):
        check_fp8(torch.device("cpu"), torch.float32)
    monkeypatch.delattr(eight_bit.functional, "scaled_mm")
    with pytest.raises(UserError, match=r"weight_format: fp8 needs a newer PyTorch than .*, or set weights to int8"):
        check_fp8(torch.device("cpu"), torch.float32)


def test_what_lies_on_the_steps_stays() -> None:
    steps = torch.tensor([[127.0, -127.0, 3.0, 0.0], [1.0, 127.0, -5.0, 2.0]])
    weight = steps * torch.tensor([[0.5], [0.25]])
    linear = Int8Linear(linear_of(weight))
    assert torch.equal(linear.values.float(), steps)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.scale, torch.tensor([[0.5], [0.25]]))


def test_a_forward_is_that_of_the_rounded_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = linear_of(torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator))
    inputs = torch.randn(3, 5, generator=generator)
    int8 = Int8Linear(linear)
    assert torch.equal(int8(inputs), nn.functional.linear(inputs, int8.weight, linear.bias))
    assert 0 < (int8(inputs) - linear(inputs)).abs().max() < 0.1


@given(units=st.integers(1, 6), width=st.integers(1, 4), axis=st.integers(0, 1), data=st.data())
def test_gathered_is_what_the_dense_weight_has_there(units: int, width: int, axis: int, data: st.DataObject) -> None:
    shape = (units * width, 5) if axis == 0 else (5, units * width)
    for of_kind in KINDS.values():
        linear = of_kind(linear_of(torch.randn(shape, generator=torch.Generator().manual_seed(units))))
        kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1))))
        expected = gather_units(linear.weight, axis, kept, units)
        linear.kept = linear.gathered(axis, kept, units)
        assert torch.equal(linear.weight, expected)


# --- whatever reads weights


@pytest.mark.parametrize("repaired", [False, True], ids=["as it is", "repaired"])
@pytest.mark.parametrize("name", MODEL_MASKS)
def test_the_shrunk_model_is_that_of_the_rounded_weights(pair, name: str, repaired: bool) -> None:
    model, twin = pair
    keep, tokens = MODEL_MASKS[name], some_tokens()
    outputs = some_outputs(twin, keep, bias=True) if repaired else {}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense = logits_of(model, tokens)
    with Evaluator(PrunableModel.of(model)).shrunk(keep, outputs), Evaluator(twin).shrunk(keep, outputs):
        torch.testing.assert_close(logits_of(model, tokens), logits_of(twin, tokens), rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits_of(model, tokens), dense)
    torch.testing.assert_close(dense, logits_of(twin, tokens), rtol=1e-5, atol=1e-5)


def test_a_forward_that_fails_leaves_no_trace(pair) -> None:
    model, _ = pair
    dense = logits_of(model, some_tokens())

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[3].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Evaluator(PrunableModel.of(model)).losses([MODEL_MASKS["random"]], some_tokens())
    handle.remove()
    assert torch.equal(logits_of(model, some_tokens()), dense)
    spec = PrunableModel.of(model).shape.spec
    assert all(linear.kept is None for layer in model.model.layers for _, _, linear in projections(spec, layer))


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs", "magnitude"])
def test_scores_are_those_of_the_rounded_weights(pair, metric: str) -> None:
    found, expected = (score(PrunableModel.of(model), metric, TEXT, 0) for model in pair)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_the_width_table_is_that_of_the_rounded_weights(pair) -> None:
    scores = {(i, name): torch.arange(n).double() for i in range(4) for name, n in (("attention", 4), ("ffn", 24))}
    found, expected = (
        WidthTable.of(PrunableModel.of(model), dict(solve_layers(PrunableModel.of(model), scores, TEXT, 1e-2, True)))
        for model in pair
    )
    for key in scores:
        torch.testing.assert_close(found.errors[key], expected.errors[key], rtol=1e-3, atol=1e-6)
        for width, output in expected.outputs[key].items():
            torch.testing.assert_close(found.outputs[key][width].weight, output.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["bias", "least-squares", "least-squares-bias"])
def test_a_repair_is_of_the_rounded_weights(pair, method: str) -> None:
    found, expected = (
        repair(PrunableModel.of(model), MODEL_MASKS["random"], TEXT, method, 1e-2, reselect=False) for model in pair
    )
    assert found.outputs.keys() == expected.outputs.keys()
    for key, output in expected.outputs.items():
        torch.testing.assert_close(found.outputs[key].weight, output.weight, rtol=1e-3, atol=1e-3)


def test_shapes_and_costs_do_not_change(pair) -> None:
    found, expected = (PrunableModel.of(model).shape for model in pair)
    assert found == expected


def test_a_latency_counts_no_rounding(pair) -> None:
    """Between the two looks at the clock no weight is made of int8: whole and halved blocks alike."""
    model, _ = pair
    made = []

    def clock(_: torch.device) -> int:
        made.append([linear.kept is not None for _, _, linear in linears])
        return len(made)

    spec = PrunableModel.of(model).shape.spec
    linears = [found for layer in model.model.layers for found in projections(spec, layer)]
    measure_latency(Evaluator(PrunableModel.of(model)), 8, clock)
    assert all(any(look) for look in made)


def test_a_step_makes_one_blocks_weights_at_a_time() -> None:
    model = tiny_model("llama-mha")
    block = max(sum(p.nbytes for p in part.parameters()) for part in model.model.layers[0].children())
    whole = sum(p.nbytes for p in model.model.layers.parameters())
    quantize_projections(model, "int8")
    tokens = some_tokens()[:1, :4]
    with Allocations() as seen:
        Evaluator(PrunableModel.of(model)).losses([MODEL_MASKS["dense"], MODEL_MASKS["random"]], tokens)
    assert seen.peak < 1.25 * block + 8_000 < whole / 2


# --- fp8: one input that is rounded the other way changes all that follows, so products are looked at one by one


@pytest.mark.parametrize("repaired", [False, True], ids=["as it is", "repaired"])
@pytest.mark.parametrize("name", MODEL_MASKS)
def test_every_product_of_a_shrunk_forward_is_that_of_both_rounded(
    architecture: str, name: str, repaired: bool, chip: LikeAChip
) -> None:
    model, keep, tokens = tiny_model(architecture), MODEL_MASKS[name], some_tokens()
    spec = PrunableModel.of(model).shape.spec
    outputs = some_outputs(model, keep, bias=True) if repaired else {}
    expected = Evaluator(PrunableModel.of(model)).losses([keep], tokens, [outputs])
    quantize_projections(model, "fp8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []

    def check(linear: Fp8Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        rows = inputs[0].flatten(0, -2)
        if not isinstance(linear.kept, Tensor):
            rows = torch.stack([slowly_rounded(row) for row in rows])
        found = nn.functional.linear(rows, linear.weight, linear.bias).view(output.shape)
        torch.testing.assert_close(output, found, rtol=1e-4, atol=1e-5)
        seen.append(linear.weight.shape)

    for layer in model.model.layers:
        for _, _, linear in projections(spec, layer):
            linear.register_forward_hook(check)
    torch.testing.assert_close(
        Evaluator(PrunableModel.of(model)).losses([keep], tokens, [outputs]), expected, rtol=0.03, atol=0
    )
    shapes = [
        tuple(output.weight.shape) if output else tuple(gather_units(weight, projection.axis, *units).shape)
        for output, weight, projection, *units in gathers(model, keep, outputs)
    ]
    assert seen == shapes
    assert chip.calls == len(shapes) - len(outputs)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def gathers(
    model: nn.Module, keep: ModelMask, outputs: Outputs
) -> Iterator[tuple[Output | None, Tensor, Projection, Tensor, int]]:
    """Of every projection that runs: what repairs it, its weight, itself, its kept units, and how many it has."""
    for index, (layer, kept) in enumerate(zip(model.model.layers, keep, strict=True)):
        for name, block in PrunableModel.of(model).shape.spec.blocks():
            mask = kept.of(name)
            for projection in block.projections if mask.any() else ():
                weight = layer.get_submodule(block.module).get_submodule(projection.name).weight
                output = outputs.get((index, name)) if projection == block.output else None
                yield output, weight, projection, mask.nonzero().squeeze(1), len(mask)


@pytest.mark.parametrize("metric", ["wanda-sp", "flap", "obs"])
def test_scores_from_fp8_are_nearly_those_from_the_model_itself(metric: str) -> None:
    plain, model = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    quantize_projections(model, "fp8")
    found = score(PrunableModel.of(model), metric, TEXT, 0)
    for key, expected in score(plain, metric, TEXT, 0).items():
        assert not torch.equal(found[key], expected)
        if key.endswith("ffn"):  # of 4 groups some are too much alike
            assert float(torch.corrcoef(torch.stack([found[key], expected]))[0, 1]) > 0.9


def test_a_repair_on_fp8_is_nearly_that_on_the_model_itself() -> None:
    """Both keep about the same of what a block put out."""
    plain, model = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    quantize_projections(model, "fp8")
    keep = MODEL_MASKS["random"]
    held = some_tokens(9, rows=8)
    losses = [
        float(Evaluator(plain).losses([keep], held, [outputs]))
        for outputs in (
            repair(plain, keep, TEXT, "least-squares", 1e-2, reselect=False).outputs,
            repair(PrunableModel.of(model), keep, TEXT, "least-squares", 1e-2, reselect=False).outputs,
        )
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[1] != losses[0]


# --- loading


def same(found: nn.Module, expected: nn.Module) -> None:
    parameters = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == parameters.keys()
    assert all(torch.equal(value, parameters[name]) for name, value in found.named_parameters())
    assert torch.equal(logits_of(found, some_tokens()), logits_of(expected, some_tokens()))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_what_is_loaded_is_what_rounding_makes_of_the_model(
    architecture: str, dtype: str, kind: WeightFormat, tmp_path: Path
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    expected = load_model(resolve(str(tmp_path)), dtype, "cpu")
    quantize_projections(expected, kind)
    found = load_model(resolve(str(tmp_path)), dtype, "cpu", kind)
    same(found, expected)
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    empty = empty_model(str(tmp_path), dtype, kind)
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in found.named_parameters()
    ]


def test_of_shards_and_of_old_files_what_belongs_to_the_model(damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    expected = load_model(resolve(str(damaged)), "float32", "cpu", "int8")
    (damaged / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"two.safetensors": names[::2], "one.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, damaged / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (damaged / INDEX).write_text(json.dumps(index))
    same(load_model(resolve(str(damaged)), "float32", "cpu", "int8"), expected)


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_is_tied_where_it_is_the_embedding(differs: bool, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + differs
    save_file(tensors | {HEAD: head.clone()}, damaged / "model.safetensors", metadata={"format": "pt"})
    expected = load_model(resolve(str(damaged)), "float32", "cpu")
    quantize_projections(expected, "int8")
    found = load_model(resolve(str(damaged)), "float32", "cpu", "int8")
    same(found, expected)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is not differs


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_gguf_file_is_rounded_once_it_is_unpacked(kind: WeightFormat, tmp_path: Path) -> None:
    tiny_model("llama-mha").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    source = resolve(str(tmp_path / "dense"))
    keep = (LayerMask(torch.ones(4, dtype=torch.bool), torch.ones(24, dtype=torch.bool)),) * 4
    decision = Decision(keep, str(tmp_path), source.fingerprint(), 0.0, "dtype: float32\n", 0, 0, 0, None)
    gguf.plan(source, decision, Options(ShapeRequirements(), "float32")).write(tmp_path / "dense.gguf", lambda _: None)
    unpacked = resolve(str(tmp_path / "dense.gguf"))
    same(load_model(unpacked, "float32", "cpu", kind), load_model(source, "float32", "cpu", kind))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_is_never_whole_in_memory(kind: WeightFormat, tmp_path: Path) -> None:
    """Of 72 projections one at a time exists in another form than 8 bits."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    with Allocations() as seen:
        model = load_model(source, "bfloat16", "cpu", kind)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    largest = 64 * 256 * (4 + 2 + 2 + 1)  # read, in magnitude, in float32, and in 8 bits
    assert kept < seen.peak < kept + largest + 10_000 < 0.75 * 2 * sum(p.numel() for p in model.parameters())


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(folder)), "float32", "cpu", "int8")
    return str(caught.value).removeprefix(f"{folder}: ")


def test_what_is_wrong_with_files_is_said_as_ever(damaged: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    path, tensors = damaged / "model.safetensors", load_file(damaged / "model.safetensors")

    def changed(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, path, metadata={"format": "pt"})
        return refused(damaged)

    assert changed({key: value for key, value in tensors.items() if key != name}) == (
        f"its files lack 1 weights, the first is {name}"
    )
    assert changed(tensors | {name: tensors[name][:5].clone()}) == (
        f"1 weights do not fit its config: {name} has the shape (5, 32), and by the config it should be (24, 32)"
    )
    for bad in (torch.nan, torch.inf):
        broken = tensors[name].clone()
        broken[3, 5] = bad
        assert changed(tensors | {name: broken}).startswith("model.layers.1.mlp.up_proj.scale holds NaN or infinity")
    path.write_bytes(path.read_bytes()[:999])
    assert "damaged or not safetensors" in refused(damaged)


def test_on_several_devices_it_computes_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them the CPU, but with accelerate's hooks."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[multi-gpu]'")
    dispatched = accelerate.dispatch_model
    monkeypatch.setattr(accelerate, "dispatch_model", lambda *given: dispatched(*given, force_hooks=True))
    alone = Evaluator(load_model(resolve("demo"), "float32", "cpu", "int8"))
    monkeypatch.setattr(loading, "devices_of", lambda _: [torch.device("cpu")] * 2)
    hooked = Evaluator(load_model(resolve("demo"), "float32", "cpu,cpu", "int8"))
    assert all(hasattr(layer, "_hf_hook") for layer in hooked.layers)
    space = alone.shape.space(("attention", "ffn"))
    keep = alone.shape.keep(space, torch.arange(space.n) % 3 > 0)
    tokens = torch.arange(48).view(2, 24)
    assert torch.equal(hooked.losses([keep], tokens), alone.losses([keep], tokens))
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"several devices needs the extra: pip install 'pgprune\[multi-gpu\]'"):
        load_model(resolve("demo"), "float32", "cpu,cpu", "int8")


# --- a search with them


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_search_is_repaired_on_rounded_weights_and_exported_from_stored_ones(
    kind: str, small, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = small(*WIDTH_SEARCH, "dtype=float32", f"weights={kind}", "calibration.windows=24")
    decision: Decision = search(recipe, run)
    plain = search(small(*WIDTH_SEARCH, "dtype=float32", "calibration.windows=24"), tmp_path / "plain")
    assert decision.heldout_loss == pytest.approx(plain.heldout_loss, rel=0.05)
    assert decision.heldout_loss != plain.heldout_loss
    export(run, tmp_path / "model", options_of("hf", "float32", None, False, 1, 1))
    layer = next(index for index, kept in enumerate(decision.model_mask) if kept.ffn.any() and not kept.ffn.all())
    name = f"model.layers.{layer}.mlp.gate_proj.weight"
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as base:
        stored = base.get_tensor(name).float()[decision.model_mask[layer].ffn]
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert any(torch.equal(value, stored) for key, value in exported.items() if key.endswith("mlp.gate_proj.weight"))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_metric_with_gradients_is_refused(kind: str, small, tmp_path: Path) -> None:
    recipe = small(f"weights={kind}", "scores.metric=taylor")
    for job in (search, init_scores):
        with pytest.raises(UserError) as caught:
            job(recipe, tmp_path / "run")
        assert str(caught.value) == (
            f"scores.metric: taylor takes gradients, which {kind} weights have not; set weights to dtype, or take a "
            "metric without, such as obs"
        )
    with pytest.raises(UserError, match="taylor takes gradients"):
        estimate(recipe)
    with pytest.raises(UserError, match="taylor takes gradients"):
        compare(small(f"weights={kind}"), tmp_path / "out", [0], ["llm-pruner"], None)


def test_a_latency_of_fp8_is_refused(small, tmp_path: Path) -> None:
    for job in (search, init_scores):
        with pytest.raises(
            UserError, match=r"budget\.of: a latency would be that of fp8 products, and exports have none"
        ):
            job(small("weight_format=fp8", "budget.measure=latency"), tmp_path / "run")


def test_a_dry_run_knows_of_it(small) -> None:
    plain, int8, fp8 = (estimate(small("dtype=bfloat16", f"weights={w}")) for w in ("dtype", *KINDS))
    assert int8["parameters"] == fp8["parameters"] == plain["parameters"]
    assert int8["memory"]["weights"] < fp8["memory"]["weights"] < 1.1 * int8["memory"]["weights"]  # wider scales
    assert fp8["memory"]["slices"] < plain["memory"]["slices"]
    projections_ = 2 * plain["parameters"] - int8["memory"]["weights"]
    layers = sum(p.numel() for p in empty_model("demo", "bfloat16").model.layers.parameters() if p.dim() == 2)
    assert projections_ == pytest.approx(layers, rel=0.02)
    assert int8["memory"]["slices"] > plain["memory"]["slices"]
