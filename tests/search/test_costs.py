"""Unit costs: FLOPs as torch counts them, bytes as transformers caches them, and latency by a simulated clock."""

import copy
from typing import Any

import pytest
import torch
from helpers.masks import keep_first
from helpers.messages import refused
from helpers.models import EXPERT_ARCHITECTURES, tiny_config, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pgprune_cli.core.grid import GridCost, first_elements
from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import kept_shape
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.search.costs import (
    REPEATS,
    WARM_UPS,
    active_parameters,
    flops,
    kv_cache,
    latency_of_run,
    measure_latency,
)
from pgprune_cli.storage.records import read_record, write_record

CONTEXT = 12
MEASURED = {
    "attention": tuple(GridCost(element, 5) for element in (7, 8, 9, 10)),
    "ffn": tuple(map(GridCost, (1, 2, 3, 4))),
}


def counted_flops(model: nn.Module, tokens: int) -> int:
    """What torch counts in the decoder layers for one sequence."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False)
    return sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("layers.0"))


LLAMAS = ("llama-mha", "llama-gqa", "llama-biased", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("architecture", LLAMAS)
def test_flops_are_those_that_torch_counts_but_for_the_keys_that_no_query_sees(architecture: str) -> None:
    """torch counts every query with every key. A causal one sees (T + 1)/2 of T on average."""
    model = tiny_model(architecture)
    counted = counted_flops(model, CONTEXT)
    attention = model.model.layers[0].self_attn
    unseen = 4 * attention.head_dim * model.config.num_attention_heads * CONTEXT * (CONTEXT - 1) // 2
    costs, shape = flops(PrunableModel.of(model), CONTEXT), PrunableModel.of(model).shape
    assert CONTEXT * shape.cost(costs) == 4 * (counted - unseen)
    assert costs == {name: by_layer[:1] * 4 for name, by_layer in costs.items()}


def test_flops_of_a_mask_are_those_that_torch_counts_in_the_shrunk_model() -> None:
    """With fewer query heads per KV head, too."""
    model = tiny_model("llama-gqa")
    prunable = PrunableModel.of(model)
    costs = flops(prunable, CONTEXT)
    for heads in ((4, 1), (2, 2), (3, 1)):
        model_mask = keep_first(model, [(heads, 11)] * 4)
        with Evaluator(prunable).shrunk(model_mask) as shrunk:
            counted = counted_flops(shrunk, CONTEXT)
        unseen = 4 * 8 * heads[0] * heads[1] * CONTEXT * (CONTEXT - 1) // 2
        assert CONTEXT * prunable.shape.cost(costs, model_mask) == 4 * (counted - unseen)


def test_the_ffn_takes_two_flops_a_weight_and_attention_more_with_the_context() -> None:
    model = PrunableModel.of(tiny_model("llama-biased"))
    assert flops(model, 1)["ffn"][0] == GridCost(2 * 3 * 32)
    query_head, kv_head = 2 * 2 * 8 * 32 + 4 * 8, 2 * 2 * 8 * 32  # weights of q and o, and of k and v
    assert flops(model, 1)["attention"][0] == GridCost(query_head, kv_head)
    assert flops(model, 101)["attention"][0] == GridCost(query_head + 4 * 8 * 50, kv_head)


def test_a_sliding_window_bounds_what_attention_costs() -> None:
    model = PrunableModel.of(tiny_model("mistral"))  # a window of 16
    weights = flops(PrunableModel.of(tiny_model("llama-gqa")), 1)["attention"][0].element - 4 * 8
    for context in (10, 16, 17, 64):
        seen = sum(min(t, 16) for t in range(1, context + 1))
        assert flops(model, context)["attention"][0].element == weights + round(4 * 8 * seen / context)
    assert kv_cache(model, 10)["attention"][0] == GridCost(0, 2 * 8 * 4 * 10)
    assert kv_cache(model, 64)["attention"][0] == GridCost(0, 2 * 8 * 4 * 16)


def bytes_of(layer: Any) -> int:
    """Return the bytes of a layer of the cache: keys and values, or the states of a DeltaNet."""
    if hasattr(layer, "keys"):
        return layer.keys.nbytes + layer.values.nbytes
    return sum(state.nbytes for states in (layer.conv_states, layer.recurrent_states) for state in states.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_bytes_are_those_of_a_real_cache(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(CONTEXT).unsqueeze(0), use_cache=True).past_key_values
    real = [bytes_of(layer) for layer in cache.layers]
    costs = kv_cache(PrunableModel.of(model), CONTEXT)
    assert [4 * cost.group for cost in costs["attention"] if cost.group] == real
    assert all(cost.element == 0 for cost in costs["attention"])
    assert costs["ffn"] == (GridCost(0),) * 4


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
        prunable = PrunableModel.of(model)
        self.runs = [0] * len(prunable.layers)
        for index, layer in enumerate(prunable.layers):
            for block in prunable.family.blocks_of(layer):
                layer.get_submodule(block.module).register_forward_pre_hook(lambda *_: self.work(overhead))
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


@pytest.mark.parametrize("architecture", LLAMAS)
def test_latencies_of_elements_and_groups_are_what_the_time_grows_by_with_them(architecture: str) -> None:
    """Those of query heads and of KV heads, by blocks with half of each."""
    model = tiny_model(architecture)
    costs = measure_latency(PrunableModel.of(model), CONTEXT, WorkClock(model, overhead=12_345))
    pair = 2 * 32 * 8  # weights of q and o, or of k and v
    attention = GridCost(2 * pair) if architecture == "llama-mha" else GridCost(pair, pair)
    assert costs == {"attention": (attention,) * 4, "ffn": (GridCost(3 * 32),) * 4}


def test_a_reading_that_comes_late_now_and_then_changes_nothing() -> None:
    model = tiny_model("llama-gqa")
    clock = WorkClock(model)
    expected = measure_latency(PrunableModel.of(model), CONTEXT, clock)
    assert clock.readings % (WARM_UPS + REPEATS) == 0
    per_round = clock.readings // (WARM_UPS + REPEATS)
    warm = WARM_UPS * per_round
    model = tiny_model("llama-gqa")
    late = frozenset({*range(warm), *(warm + number * per_round + number for number in range(REPEATS // 2))})
    assert measure_latency(PrunableModel.of(model), CONTEXT, WorkClock(model, late=late)) == expected
    assert expected == PrunableModel.of(model).shape.parameters


def test_an_element_takes_at_least_a_nanosecond() -> None:
    model = PrunableModel.of(tiny_model("qwen2"))
    expected = {"attention": (GridCost(1, 0),) * 4, "ffn": (GridCost(1),) * 4}
    assert measure_latency(model, CONTEXT, lambda _: 0) == expected


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


def test_a_single_kv_head_costs_what_its_query_heads_do_not() -> None:
    """MQA: no block with fewer KV heads can be timed, so only its query heads have a price of their own."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama-gqa")
    config.num_key_value_heads = 1
    model = AutoModelForCausalLM.from_config(config)
    costs = measure_latency(PrunableModel.of(model), CONTEXT, WorkClock(model))
    assert costs["attention"] == (GridCost(2 * 32 * 8),) * 4
    assert costs["ffn"] == PrunableModel.of(model).shape.parameters["ffn"]


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
        "attention": [[7, 5, 0], [8, 5, 0], [9, 5, 0], [10, 5, 0]],
        "ffn": [[1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]],
    }


@pytest.mark.parametrize(
    "damage",
    [
        {"attention": [[7, 5, 0], [8, 5, 0], [9, 5, 0]]},
        {"attention": [7, 8, 9, 10]},
        {"attention": [[7, 5, 0], [8, 5, 0], [9, 5, 0], [10, 5]]},
        {"attention": [[7, 5, 0], [8, 5, 0], [9, 5, 0], [10, -5, 0]]},
        {"ffn": [[1, 0, 0], [2, 0, 0], [3, 0, 0], [0, 0, 0]]},
        {"ffn": [[1, 0, 0], [2, 0, 0], [3, 0, 0], ["4", 0, 0]]},
        {"ffn": [[1, 0, 0], [2, 0, 0], [3, 0, 0], [4.0, 0, 0]]},
        {"ffn": [[1, 0, 0], [2, 0, 0], [3, 0, 0], [True, 0, 0]]},
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


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
@pytest.mark.parametrize(("experts", "channels"), [(8, 12), (5, 12), (8, 8), (2, 4)])
def test_active_parameters_are_those_that_one_token_uses(architecture: str, experts: int, channels: int) -> None:
    """Counted by hand: every router row, and the channels of the experts that a token is sent to.

    The output biases of those experts are left out: a token uses as many of them whatever is removed.
    """
    model = tiny_model(architecture)
    prunable = PrunableModel.of(model)
    layer, family, shape = prunable.layers[0], prunable.family, prunable.shape
    grid, cost = shape.grids["ffn"][0], active_parameters(prunable)["ffn"][0]
    kept = first_elements(grid, experts, channels)
    counted = 0
    for tensor in family.unit_tensors(layer, family.ffn):
        shape_kept = kept_shape(tensor, layer.mlp.get_parameter(tensor.name).shape, kept)
        if tensor.stacked:
            counted += shape_kept.numel() // experts * model.config.num_experts_per_tok
        elif not tensor.name.startswith("experts."):
            counted += shape_kept.numel()
    assert cost.of_mask(grid, kept) == counted
