"""Unit costs: FLOPs as torch counts them, bytes as transformers caches them, and latency by a simulated clock."""

import copy

import pytest
import torch
from helpers.messages import refused
from helpers.models import tiny_config, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pgprune_cli.errors import UserError
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.search.costs import WARM_UPS, flops, kv_cache, latency_of_run, measure_latency
from pgprune_cli.storage.records import read_record, write_record

CONTEXT = 12
MEASURED = {"attention": (7, 8, 9, 10), "ffn": (1, 2, 3, 4)}


def counted_flops(model: nn.Module, tokens: int) -> int:
    """What torch counts in the decoder layers for one sequence."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False)
    return sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("layers.0"))


def test_flops_are_those_that_torch_counts_but_for_the_keys_that_no_query_sees(architecture: str) -> None:
    """torch counts every query with every key. A causal one sees (T + 1)/2 of T on average."""
    model = tiny_model(architecture)
    counted = counted_flops(model, CONTEXT)
    attention = model.model.layers[0].self_attn
    unseen = 4 * attention.head_dim * model.config.num_attention_heads * CONTEXT * (CONTEXT - 1) // 2
    costs = flops(PrunableModel.of(model), CONTEXT)
    assert CONTEXT * (4 * costs["attention"][0] + 24 * costs["ffn"][0]) == counted - unseen
    assert costs == {name: by_layer[:1] * 4 for name, by_layer in costs.items()}


def test_the_ffn_takes_two_flops_a_weight_and_attention_more_with_the_context() -> None:
    model = tiny_model("llama-biased")
    shape = PrunableModel.of(model).shape
    assert flops(PrunableModel.of(model), 1)["ffn"][0] == 2 * 3 * 32
    assert (
        flops(PrunableModel.of(model), 1)["attention"][0]
        == 2 * (shape.parameters["attention"][0] - 2 * 8 - 8 - 8) + 4 * 8 * 2
    )
    assert (
        flops(PrunableModel.of(model), 101)["attention"][0] - flops(PrunableModel.of(model), 1)["attention"][0]
        == 4 * 8 * 2 * 50
    )


def test_a_sliding_window_bounds_what_attention_costs() -> None:
    model = tiny_model("mistral")  # a window of 16
    weights = flops(PrunableModel.of(tiny_model("llama-gqa")), 1)["attention"][0] - 4 * 8 * 2
    for context in (10, 16, 17, 64):
        seen = sum(min(t, 16) for t in range(1, context + 1))
        assert flops(PrunableModel.of(model), context)["attention"][0] == weights + round(4 * 8 * 2 * seen / context)
    assert kv_cache(PrunableModel.of(model), 10)["attention"][0] == 2 * 8 * 4 * 10
    assert kv_cache(PrunableModel.of(model), 64)["attention"][0] == 2 * 8 * 4 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_bytes_are_those_of_a_real_cache(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(CONTEXT).unsqueeze(0), use_cache=True).past_key_values
    real = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    costs = kv_cache(PrunableModel.of(model), CONTEXT)
    assert [4 * cost for cost in costs["attention"]] == real
    assert costs["ffn"] == (0, 0, 0, 0)


def test_costs_of_a_model_on_the_meta_device(architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32)
    assert flops(PrunableModel.of(empty), 100) == flops(PrunableModel.of(tiny_model(architecture)), 100)
    assert kv_cache(PrunableModel.of(empty), 100) == kv_cache(PrunableModel.of(tiny_model(architecture)), 100)


# --- latency


class WorkClock:
    """A clock that stands still but for the weights of the linear layers that run: one nanosecond each.

    Every block also takes `overhead` nanoseconds, and the readings in `late` (counted from 0) come a second later.
    """

    def __init__(self, model: nn.Module, overhead: int = 0, late: frozenset[int] = frozenset()) -> None:
        self.now, self.readings, self.late = 0, 0, late
        self.runs = [0] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):
            for block in (layer.self_attn, layer.mlp):
                block.register_forward_pre_hook(lambda *_: self.work(overhead))
            for linear in (module for module in layer.modules() if isinstance(module, nn.Linear)):
                linear.register_forward_hook(lambda module, *_: self.work(module.weight.numel()))
            layer.register_forward_hook(lambda *_, index=index: self.ran(index))

    def work(self, nanoseconds: int) -> None:
        self.now += nanoseconds

    def ran(self, index: int) -> None:
        self.runs[index] += 1

    def __call__(self, device: torch.device) -> int:
        assert device == torch.device("cpu")
        self.now += 10**9 * (self.readings in self.late)
        self.readings += 1
        return self.now


def test_the_latency_of_a_unit_is_what_the_time_grows_by_with_it(architecture: str) -> None:
    model = tiny_model(architecture)
    shape = PrunableModel.of(model).shape
    weights = [2 * 32 * 8 * (1 + model.config.num_attention_heads // 4)] * 4
    costs = measure_latency(PrunableModel.of(model), CONTEXT, WorkClock(model, overhead=12_345))
    assert costs == {"attention": tuple(weights), "ffn": (3 * 32,) * 4}
    if architecture in ("llama-mha", "llama-gqa", "mistral", "qwen3"):  # without biases
        assert costs == shape.parameters


def test_a_reading_that_comes_late_now_and_then_changes_nothing() -> None:
    model = tiny_model("llama-gqa")
    late = frozenset({*range(8 * WARM_UPS), 8 * WARM_UPS + 1, 8 * WARM_UPS + 18, 8 * WARM_UPS + 39})
    assert (
        measure_latency(PrunableModel.of(model), CONTEXT, WorkClock(model, late=late))
        == PrunableModel.of(model).shape.parameters
    )


def test_a_unit_takes_at_least_a_nanosecond() -> None:
    assert measure_latency(PrunableModel.of(tiny_model("qwen2")), CONTEXT, lambda _: 0) == {
        "attention": (1,) * 4,
        "ffn": (1,) * 4,
    }


def test_layers_that_are_alike_are_timed_once() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = tiny_model("llama-gqa")
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = 7
    model.model.layers[2].mlp = LlamaMLP(narrow)
    clock = WorkClock(model)
    assert measure_latency(PrunableModel.of(model), CONTEXT, clock) == PrunableModel.of(model).shape.parameters
    timed = [runs > 2 for runs in clock.runs]
    assert timed == [True, False, True, False]


def test_a_single_group_costs_the_whole_block() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama-gqa")
    config.num_key_value_heads = 1
    model = AutoModelForCausalLM.from_config(config)
    costs = measure_latency(PrunableModel.of(model), CONTEXT, WorkClock(model))
    assert costs == PrunableModel.of(model).shape.parameters


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama-biased")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.arange(CONTEXT).unsqueeze(0)
    logits = model(input_ids=tokens).logits
    measure_latency(PrunableModel.of(model), CONTEXT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=tokens).logits, logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_measures_once_and_reads_ever_after(tmp_path, monkeypatch) -> None:
    model = PrunableModel.of(tiny_model("llama-gqa"))
    monkeypatch.setattr("pgprune_cli.search.costs.measure_latency", lambda *_: MEASURED)
    first = latency_of_run(tmp_path, model, CONTEXT, "abc")
    monkeypatch.setattr("pgprune_cli.search.costs.measure_latency", None)
    assert latency_of_run(tmp_path, model, CONTEXT, "abc") == first == MEASURED
    assert read_record(tmp_path / COSTS_FILE) == {
        "measure": "latency",
        "nanoseconds_at_tokens": CONTEXT,
        "fingerprint": "abc",
        "device": "cpu",
        "attention": [7, 8, 9, 10],
        "ffn": [1, 2, 3, 4],
    }


@pytest.mark.parametrize(
    "damage",
    [
        {"attention": [7, 8, 9]},
        {"ffn": [1, 2, 3, 0]},
        {"ffn": [1, 2, 3, "4"]},
        {"ffn": [1, 2, 3, 4.0]},
        {"ffn": [1, 2, 3, True]},
        {"attention": None},
        {"fingerprint": "another"},
        {"nanoseconds_at_tokens": 13},
        {"measure": "flops"},
    ],
)
def test_latency_costs_of_another_model_or_of_wrong_form_are_refused(damage, tmp_path, monkeypatch) -> None:
    model = PrunableModel.of(tiny_model("llama-gqa"))
    monkeypatch.setattr("pgprune_cli.search.costs.measure_latency", lambda *_: MEASURED)
    latency_of_run(tmp_path, model, CONTEXT, "abc")
    record = read_record(tmp_path / COSTS_FILE)
    write_record(tmp_path / COSTS_FILE, record | damage)
    with refused(COSTS_FILE, "another model or context"):
        latency_of_run(tmp_path, model, CONTEXT, "abc")


def test_truncated_latency_costs_are_refused(tmp_path) -> None:
    (tmp_path / COSTS_FILE).write_text('{"of": "lat')
    with pytest.raises(UserError, match=r"costs\.json: cannot be read"):
        latency_of_run(tmp_path, PrunableModel.of(tiny_model("llama-gqa")), CONTEXT, "abc")
