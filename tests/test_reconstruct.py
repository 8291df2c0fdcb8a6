"""Repair against least squares on explicit tokens; and what every width costs, against dropping units one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from torch import Tensor, nn

from pgprune_cli import reconstruct
from pgprune_cli.arch import Keep, LayerKeep, Output, Outputs, Shape
from pgprune_cli.reconstruct import (
    Moments,
    WidthTable,
    compensated_output,
    level_of,
    observe_moments,
    repair,
    repaired_output,
    width_table,
)
from pgprune_cli.streaming import layer_inputs
from pgprune_cli.substrate import Evaluator

GROUPS, CHANNELS, LAYERS = 4, 24, 4
DAMPING = 1e-6
BLOCKS = [(index, name) for index in range(LAYERS) for name in ("attention", "ffn")]


def batches() -> list[Tensor]:
    """Of several shapes, most of them longer than the tiny Mistral's window of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 20), (1, 40), (2, 20), (3, 7))]


def some_keep() -> Keep:
    """Blocks with about half their units, and among them a whole layer, whole blocks and empty ones."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for index in range(LAYERS):
        attention, ffn = torch.rand(GROUPS, generator=generator) < 0.5, torch.rand(CHANNELS, generator=generator) < 0.5
        attention[index] = ffn[index] = True
        attention[(index + 1) % GROUPS] = ffn[index + 5] = False
        layers.append(LayerKeep(attention, ffn))
    layers[1] = LayerKeep(torch.ones(GROUPS).bool(), layers[1].ffn)
    layers[2] = LayerKeep(torch.zeros(GROUPS).bool(), layers[2].ffn)
    layers[3] = LayerKeep(layers[3].attention, torch.zeros(CHANNELS).bool())
    return tuple(layers)


KEEP = some_keep()
REPAIRED = [(0, "attention"), (0, "ffn"), (1, "ffn"), (2, "ffn"), (3, "attention")]


def whole() -> Keep:
    return tuple(LayerKeep(torch.ones(GROUPS).bool(), torch.ones(CHANNELS).bool()) for _ in range(LAYERS))


def output_linear(model: nn.Module, index: int, name: str) -> nn.Linear:
    layer = model.model.layers[index]
    return layer.self_attn.o_proj if name == "attention" else layer.mlp.down_proj


def columns_of(mask: Tensor, inputs: int) -> Tensor:
    return mask.repeat_interleave(inputs // len(mask)).nonzero().flatten()


def seen(model: nn.Module, index: int, name: str) -> tuple[Tensor, Tensor]:
    """The inputs `(N, in)` of an output projection on all batches, and the tokens' shares `(N,)`, float64."""
    inputs, weights = seen_weights(model, index, name)
    return inputs, weights / weights.sum()


def seen_weights(model: nn.Module, index: int, name: str) -> tuple[Tensor, Tensor]:
    """The same with the weights themselves: 1 / mean square of the token's residual stream."""
    inputs: list[Tensor] = []
    residuals: list[Tensor] = []
    watched = [
        (output_linear(model, index, name), inputs),
        (model.model.layers[index].post_attention_layernorm, residuals),
    ]
    handles = [
        module.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, -2).double()))
        for module, into in watched
    ]
    with torch.no_grad():
        for tokens in batches():
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    weights = 1.0 / torch.cat(residuals).square().mean(-1)
    return torch.cat(inputs), weights


def weighted_error(wanted: Tensor, got: Tensor, weights: Tensor) -> float:
    return float((weights[:, None] * (wanted - got).square()).sum())


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    yield
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# --- one projection


def problem(seed: int, inputs: int = 12, hidden: int = 7, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor, Moments]:
    """A weight, tokens whose inputs are correlated and not centred, their weights, and the moments of these."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden, inputs, generator=generator, dtype=torch.float64)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixed + mixed[0]
    share = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.01
    share = share / share.sum()
    return weight, x, share, Moments((x * share[:, None]).T @ x, share @ x)


COLUMNS = [[0, 3, 4, 9], [11], list(range(12)), [1, 2, 5, 6, 7, 8, 10]]


@pytest.mark.parametrize("columns", COLUMNS, ids=len)
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_repaired_output_is_the_least_squares_solution(columns: list[int], damping: float, with_bias: bool) -> None:
    weight, x, share, moments = problem(len(columns))
    some, rows = torch.tensor(columns), share.sqrt()[:, None]
    mean = share @ x if with_bias else torch.zeros(12, dtype=torch.float64)
    ridge = damping * float((share[:, None] * (x - mean).square()).sum(0).mean())
    left = torch.cat([rows * x[:, some], ridge**0.5 * torch.eye(len(some), dtype=torch.float64)])
    right = torch.cat([rows * (x @ weight.T), ridge**0.5 * weight[:, some].T])
    if with_bias:
        left = torch.cat([left, torch.cat([rows, rows.new_zeros(len(some), 1)])], dim=1)
    expected = torch.linalg.lstsq(left, right).solution.T
    bias = torch.arange(7, dtype=torch.float64)
    for own in (None, bias):
        got = repaired_output(weight, own, moments, some, damping, with_bias)
        torch.testing.assert_close(got.weight, expected[:, : len(some)], rtol=1e-7, atol=1e-7)
        if with_bias:
            wanted = expected[:, -1] + (0.0 if own is None else own)
            torch.testing.assert_close(got.bias, wanted, rtol=1e-7, atol=1e-7)
        else:
            assert got.bias is own


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_repair_keeps_weights_that_nothing_excites(with_bias: bool) -> None:
    """A channel that is always silent, and one that no other can stand for: both stay as they are."""
    weight, x, share, _ = problem(0)
    x[:, 2] = 0.0
    moments = Moments((x * share[:, None]).T @ x, share @ x)
    everything = torch.arange(12)
    got = repaired_output(weight, None, moments, everything, 1e-3, with_bias)
    torch.testing.assert_close(got.weight, weight)
    got = repaired_output(weight, None, moments, everything[:4], 1e-3, with_bias)
    torch.testing.assert_close(got.weight[:, 2], weight[:, 2])


def test_moments_that_are_a_little_indefinite_still_give_a_repair() -> None:
    weight, x, share, _ = problem(0, tokens=3)
    second = ((x * share[:, None]).T @ x).float().double() - 1e-6 * torch.eye(12, dtype=torch.float64)
    got = repaired_output(weight.float(), None, Moments(second, share @ x), torch.arange(8), 0.0, False)
    assert got.weight.dtype == torch.float32
    assert got.weight.isfinite().all()


@pytest.mark.parametrize("columns", COLUMNS, ids=len)
def test_a_compensated_output_adds_the_mean_of_what_is_gone(columns: list[int]) -> None:
    weight, x, share, moments = problem(3)
    constant = [0.0] * 7
    for row in range(7):
        for column in range(12):
            if column not in columns:
                mean = sum(float(share[token] * x[token, column]) for token in range(len(x)))
                constant[row] += float(weight[row, column]) * mean
    bias = torch.arange(7, dtype=torch.float64)
    for own in (None, bias):
        got = compensated_output(weight, own, moments, torch.tensor(columns))
        assert torch.equal(got.weight, weight[:, columns])
        wanted = torch.tensor(constant, dtype=torch.float64) + (0.0 if own is None else own)
        torch.testing.assert_close(got.bias, wanted)


# --- a model


@pytest.mark.parametrize("name", ["attention", "ffn"])
def test_moments_weigh_tokens_by_their_residual_stream(architecture: str, name: str) -> None:
    model = tiny_model(architecture)
    with left_as_it_was(model):
        stream = layer_inputs(model, batches())
        stream.advance(0)
        moments = observe_moments(stream, 1, Shape.of(model), name)
        assert stream.position == 1
    x, weights = seen(model, 1, name)
    assert moments.second.dtype == moments.first.dtype == torch.float64
    scale = float((weights[:, None] * x.square()).sum(0).mean())
    torch.testing.assert_close(moments.second, (x * weights[:, None]).T @ x, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(moments.first, weights @ x, rtol=1e-4, atol=1e-5 * scale**0.5)


def behind(model: nn.Module, outputs: Outputs, index: int, name: str) -> tuple[Tensor, Tensor]:
    """`seen` where everything in front of this block is pruned and repaired, and the block and what follows is not."""
    before = BLOCKS[: BLOCKS.index((index, name))]
    keep = tuple(
        LayerKeep(
            kept.attention if (place, "attention") in before else dense.attention,
            kept.ffn if (place, "ffn") in before else dense.ffn,
        )
        for place, (kept, dense) in enumerate(zip(KEEP, whole(), strict=True))
    )
    with Evaluator(model).shrunk(keep, {key: output for key, output in outputs.items() if key in before}):
        return seen(model, index, name)


@pytest.mark.parametrize("method", ["least-squares", "least-squares-bias", "bias"])
def test_no_block_is_worse_for_its_repair_on_the_text(architecture: str, method: str) -> None:
    model = tiny_model(architecture)
    with left_as_it_was(model):
        outputs = repair(model, KEEP, batches(), method, DAMPING)
    assert sorted(outputs) == REPAIRED  # nothing for whole and for empty blocks
    for (index, name), output in outputs.items():
        linear, mask = output_linear(model, index, name), KEEP[index].of(name)
        columns = columns_of(mask, linear.in_features)
        assert output.weight.shape == (32, len(columns))
        assert output.weight.dtype == torch.float32
        x, weights = behind(model, outputs, index, name)
        own = 0.0 if linear.bias is None else linear.bias.double()
        wanted = x @ linear.weight.double().T + own
        unrepaired = x[:, columns] @ linear.weight[:, columns].double().T + own
        bias = 0.0 if output.bias is None else output.bias.double()
        repaired = x[:, columns] @ output.weight.double().T + bias
        before, after = weighted_error(wanted, unrepaired, weights), weighted_error(wanted, repaired, weights)
        assert after <= before
        if method.startswith("least-squares"):
            moments = Moments((x * weights[:, None]).T @ x, weights @ x)
            best = repaired_output(linear.weight.double(), None, moments, columns, DAMPING, method.endswith("bias"))
            ideal = x[:, columns] @ best.weight.T + (own if best.bias is None else best.bias + own)
            assert after == pytest.approx(weighted_error(wanted, ideal, weights), rel=1e-3)
            assert after < 0.99 * before


def test_a_model_that_loses_nothing_is_not_repaired(architecture: str) -> None:
    model = tiny_model(architecture)
    with left_as_it_was(model):
        assert repair(model, whole(), batches()[:1], "least-squares", DAMPING) == {}


@pytest.mark.parametrize("place", ["0.self_attn.o_proj", "1.mlp.down_proj", "2.mlp.act_fn", "3.self_attn"])
@pytest.mark.parametrize("call", [0, 5])
def test_a_forward_that_fails_leaves_the_model_as_it_was(place: str, call: int) -> None:
    """At its first call a layer is observed, and at its sixth something of it is pruned already."""
    model, calls = tiny_model("llama-biased"), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > call:
            raise RuntimeError("out of memory")

    module = model.model.layers.get_submodule(place)
    handle = module.register_forward_pre_hook(fail)
    with left_as_it_was(model):
        if place == "3.self_attn" and call == 5:
            call = 4  # observed four times and then run pruned, once a batch
        with pytest.raises(RuntimeError, match="out of memory"):
            repair(model, KEEP, batches(), "least-squares-bias", DAMPING)
        handle.remove()


def test_one_blocks_moments_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []

    def observed(*arguments: object) -> Moments:
        assert not any(reference() for reference in alive)
        moments = observe(*arguments)
        alive.append(weakref.ref(moments))
        return moments

    observe = observe_moments
    monkeypatch.setattr(reconstruct, "observe_moments", observed)
    repair(tiny_model("qwen3"), KEEP, batches(), "least-squares", DAMPING)
    assert len(alive) == len(REPAIRED)


# --- every width


def saliency(seed: int = 0) -> dict[tuple[int, str], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(GROUPS if key[1] == "attention" else CHANNELS, generator=generator) for key in BLOCKS}


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 channels count as many, and are solved at every second width."""
    monkeypatch.setattr(reconstruct, "FEW", 8)
    assert level_of(CHANNELS) == 2


def moments_of(model: nn.Module) -> dict[tuple[int, str], Moments]:
    """Of every block of the dense model, as the table sees them."""
    stream, found = layer_inputs(model, batches()), {}
    for index in range(LAYERS):
        for name in ("attention", "ffn"):
            found[index, name] = observe_moments(stream, index, Shape.of(model), name)
        stream.advance(index)
    return found


def assert_same_output(got: Output, wanted: Output) -> None:
    torch.testing.assert_close(got.weight, wanted.weight, rtol=1e-3, atol=1e-3)
    assert (got.bias is None) == (wanted.bias is None)
    assert got.bias is None or torch.equal(got.bias, wanted.bias)


def solved(model: nn.Module, key: tuple[int, str], moments: Moments, mask: Tensor, damping: float) -> Output:
    linear = output_linear(model, *key)
    columns = columns_of(mask, linear.in_features)
    return repaired_output(linear.weight, linear.bias, moments, columns, damping, False)


def leading(order: Tensor, kept: int) -> Tensor:
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def test_a_table_holds_what_every_width_would_be_repaired_to(architecture: str, many: None) -> None:
    model = tiny_model(architecture)
    with left_as_it_was(model):
        table = width_table(model, saliency(), batches(), 1e-3, solve=True)
    assert table.outputs.keys() == {key for key in BLOCKS if key[1] == "ffn"}
    assert table.solve.keys() == {key for key in BLOCKS if key[1] == "attention"}
    for key, moments in moments_of(model).items():
        order, count = table.orders[key], len(table.orders[key])
        assert torch.equal(order, saliency()[key].argsort(descending=True))
        if key[1] == "ffn":
            assert sorted(table.outputs[key]) == list(range(2, CHANNELS, 2))
            for kept, output in table.outputs[key].items():
                assert_same_output(output, solved(model, key, moments, leading(order, kept), 1e-3))
        else:
            for kept in range(1, count):
                mask = leading(order, kept)
                assert_same_output(table.solve[key](mask), solved(model, key, moments, mask, 1e-3))


@pytest.mark.parametrize("solve", [True, False])
def test_errors_are_what_the_text_loses_at_every_width(architecture: str, solve: bool) -> None:
    model = tiny_model(architecture)
    table = width_table(model, saliency(), batches(), 1e-9, solve)
    assert solve or (table.outputs == {} and table.solve == {})
    for key in [(0, "attention"), (2, "ffn"), (3, "attention")]:
        errors, order, linear = table.errors[key], table.orders[key], output_linear(model, *key)
        assert errors.shape == (len(order) + 1,)
        assert errors.dtype == torch.float64
        assert abs(float(errors[-1])) < 1e-5 * float(errors[0])
        if solve:
            assert (errors.diff() <= 1e-9 * errors[0]).all()
        x, absolute = seen_weights(model, *key)
        weights = absolute / absolute.sum()
        moments, weight = Moments((x * weights[:, None]).T @ x, weights @ x), linear.weight.double()
        level = level_of(len(order))
        for kept in range(0, len(order), level):
            columns = columns_of(leading(order, kept), linear.in_features)
            some = weight[:, columns]
            if solve and kept:
                some = repaired_output(weight, None, moments, columns, 1e-9, False).weight
            # relative to each token's residual stream, so that layers of other magnitude can be compared
            lost = weighted_error(x @ weight.T, x[:, columns] @ some.T, absolute / len(x))
            assert float(errors[kept]) == pytest.approx(lost, rel=1e-2, abs=1e-4 * float(errors[0]))
        if level == 2:  # in between, a straight line
            torch.testing.assert_close(errors[1:-1:2], (errors[:-2:2] + errors[2::2]) / 2)


@pytest.mark.parametrize("solve", [True, False])
@pytest.mark.parametrize("families", [("attention", "ffn"), ("ffn",)])
def test_priorities_fall_along_every_layers_order(solve: bool, families: tuple[str, ...]) -> None:
    model = tiny_model("llama-gqa")
    chosen = {key: value for key, value in saliency().items() if key[1] in families}
    table, space = width_table(model, chosen, batches(), DAMPING, solve), Shape.of(model).space(families)
    values = table.priorities(space)
    assert (values.shape, values.dtype) == ((space.n,), torch.float64)
    for family in space.families:
        for index, part in enumerate(space.per_layer(values, family.name)):
            assert (part[table.orders[index, family.name]].diff() < 0).all()


def test_priorities_are_gains_per_cost_where_every_unit_counts_less_than_the_one_before() -> None:
    errors, order = torch.tensor([100.0, 36.0, 4.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    shape = Shape.of(tiny_model("llama-gqa"))
    space = shape.space(["attention"])
    table = WidthTable(
        {(i, "attention"): errors for i in range(4)}, {(i, "attention"): order for i in range(4)}, {}, {}
    )
    gains = torch.tensor([32.0, 1.0, 64.0, 3.0], dtype=torch.float64)
    for cost, part in zip(shape.group_parameters, space.per_layer(table.priorities(space), "attention"), strict=True):
        torch.testing.assert_close(part.exp(), gains / cost, rtol=1e-5, atol=0.0)


def test_priorities_fall_even_where_a_later_unit_gains_more() -> None:
    """The gains of all units are then those of the last; the order, which the outputs follow, must still be theirs."""
    shape = Shape.of(tiny_model("llama-gqa"))
    space = shape.space(["ffn"])
    errors = -torch.arange(CHANNELS + 1.0).double().square()
    generator = torch.Generator().manual_seed(0)
    orders = {(index, "ffn"): torch.randperm(CHANNELS, generator=generator) for index in range(LAYERS)}
    values = WidthTable(dict.fromkeys(orders, errors), orders, {}, {}).priorities(space)
    for index, part in enumerate(space.per_layer(values, "ffn")):
        assert (part[orders[index, "ffn"]].diff() < 0).all()
    torch.testing.assert_close(values, values.mean().expand(space.n), rtol=0.0, atol=1e-5)


def test_whole_and_empty_blocks_have_no_outputs(many: None) -> None:
    table = width_table(tiny_model("qwen2"), saliency(), batches(), DAMPING, solve=True)
    nothing = tuple(LayerKeep(torch.zeros(GROUPS).bool(), torch.zeros(CHANNELS).bool()) for _ in range(LAYERS))
    assert table.outputs_for(whole()) == {}
    assert table.outputs_for(nothing) == {}
    assert table.outputs_for((*whole()[:3], LayerKeep(KEEP[0].attention, nothing[0].ffn))).keys() == {(3, "attention")}
