"""What a unit costs, in what users budget: FLOPs, bytes of the KV cache, or time. Parameters are `Shape.parameters`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pgprune_cli.errors import UserError
from pgprune_cli.forward.layerwise import Stream, layer_inputs
from pgprune_cli.forward.masked import Evaluator, shrunk_block
from pgprune_cli.model.prunable import ArchSpec, Block, Shape, UnitCosts, projections, spec_of
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.storage.records import read_record, write_record

WARM_UPS, REPEATS = 2, 9
"""Forwards of a layer before any of them counts, and those whose median does."""

Clock = Callable[[torch.device], int]
"""Nanoseconds that have passed on a device."""


def flops(model: nn.Module, context: int) -> UnitCosts:
    """FLOPs a token in a sequence of `context` tokens (a model on the meta device will do).

    2 for every weight, and for every query head and visible key 4 · head_dim, of the scores and of their sum over the
    values; a query sees (context + 1)/2 keys on average, or those of its sliding window. Biases, norms, activations
    and the softmax are not counted.
    """
    shape = Shape.of(model)
    attention, ffn = [], []
    for layer, groups, channels in zip(_layers(model), shape.kv_heads, shape.channels, strict=True):
        heads = layer.self_attn.q_proj.out_features // layer.self_attn.head_dim // groups
        window = _window(model, layer, context)
        visible = window * (window + 1) // 2 + (context - window) * window  # keys, summed over all queries
        scores = round(4 * layer.self_attn.head_dim * heads * visible / context)
        attention.append(2 * _weights(layer, shape.spec.attention) // groups + scores)
        ffn.append(2 * _weights(layer, shape.spec.ffn) // channels)
    return UnitCosts(tuple(attention), tuple(ffn))


def kv_cache(model: nn.Module, context: int) -> UnitCosts:
    """Bytes of the KV cache that a sequence of `context` tokens fills, in the model's dtype; an FFN channel needs none.

    A sliding window bounds them.
    """
    attention = []
    for layer in _layers(model):
        size = layer.self_attn.k_proj.weight.element_size()
        attention.append(2 * layer.self_attn.head_dim * size * _window(model, layer, context))
    return UnitCosts(tuple(attention), (0,) * len(attention))


def synchronised_clock(device: torch.device) -> int:
    """Nanoseconds, read when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns()


def measure_latency(evaluator: Evaluator, context: int, clock: Clock = synchronised_clock) -> UnitCosts:
    """Nanoseconds a unit adds to the forward of one sequence of `context` tokens, at least 1; never twice the same.

    A block is timed with all and with half of its units, in turn, and the difference of the medians is divided by
    that of the widths: what a block costs however narrow it is, is no unit's. Layers that are alike are timed once.
    """
    model, shape = evaluator.model, evaluator.shape
    tokens = torch.arange(context).unsqueeze(0) % model.config.vocab_size
    stream = layer_inputs(model, [tokens], storage=evaluator.input_device)
    measured: dict[Hashable, dict[str, int]] = {}
    rows = []
    for index, layer in enumerate(stream.layers):
        linears = [linear for _, _, linear in projections(shape.spec, layer)]
        sizes = tuple((linear.weight.shape, linear.weight.dtype, linear.weight.device) for linear in linears)
        kind = (*sizes, shape.kv_heads[index], _window(model, layer, context))
        if kind not in measured:
            units = {"attention": shape.kv_heads[index], "ffn": shape.channels[index]}
            here = replace(stream, position=index)
            measured[kind] = _nanoseconds_a_unit(here, shape.spec, units, clock)
        rows.append(measured[kind])
    return UnitCosts(tuple(row["attention"] for row in rows), tuple(row["ffn"] for row in rows))


def latency_of_run(run: Path, evaluator: Evaluator, context: int, fingerprint: str) -> UnitCosts:
    """The measured latency that a run goes by: read from its `costs.json`, or measured now and written there.

    Raises UserError when the file is damaged, or of another model or context.
    """
    path = run / COSTS_FILE
    about = {"of": "latency", "nanoseconds_at_tokens": context, "fingerprint": fingerprint}
    layers = len(evaluator.shape.channels)
    if not path.exists():
        costs = measure_latency(evaluator, context)
        device = torch.cuda.get_device_name(evaluator.input_device) if evaluator.input_device.type == "cuda" else "cpu"
        write_record(path, about | {"device": device, "attention": costs.attention, "ffn": costs.ffn})
        return costs
    record = read_record(path)
    lists = [record.get("attention"), record.get("ffn")]
    whole = all(
        isinstance(values, list) and len(values) == layers and all(type(ns) is int and ns > 0 for ns in values)
        for values in lists
    )
    if not whole or any(record.get(key) != value for key, value in about.items()):
        raise UserError(
            f"{path}: damaged, or measured on another model or context; remove the run directory to start over"
        )
    return UnitCosts(tuple(record["attention"]), tuple(record["ffn"]))


def _nanoseconds_a_unit(stream: Stream, spec: ArchSpec, units: dict[str, int], clock: Clock) -> dict[str, int]:
    """Of both blocks of the layer that the stream stands at, by their names; `units` they have."""
    widths = {1.0: units, 0.5: {name: count // 2 for name, count in units.items()}}
    times: dict[float, list[dict[str, int]]] = {part: [] for part in widths}
    for _ in range(WARM_UPS + REPEATS):
        for part, kept in widths.items():
            masks = {name: torch.arange(count) < kept[name] for name, count in units.items()}
            times[part].append(_times(stream, spec, masks, clock))
    found = {}
    for name in units:
        whole, half = (statistics.median(row[name] for row in times[part][WARM_UPS:]) for part in widths)
        found[name] = max(1, round((whole - half) / (units[name] - widths[0.5][name])))
    return found


def _times(stream: Stream, spec: ArchSpec, masks: dict[str, Tensor], clock: Clock) -> dict[str, int]:
    """Nanoseconds that each block takes on its kept units; gathering them is not counted."""
    layer = stream.layers[stream.position]
    device = next(layer.parameters()).device
    passed: dict[str, list[int]] = {name: [] for name in masks}
    with ExitStack() as undo:
        for name, block in spec.blocks():
            undo.enter_context(shrunk_block(layer, name, block, masks[name], None))

            def note(module: nn.Module, *_: object, name: str = name) -> None:
                passed[name].append(clock(device))

            module = layer.get_submodule(block.module)
            # The first after the units are gathered, the second before the dense weights come back.
            undo.callback(module.register_forward_pre_hook(note).remove)
            undo.callback(module.register_forward_hook(note, prepend=True).remove)
        stream.observe(stream.position, {})
    return {name: end - start for name, (start, end) in passed.items()}


def _layers(model: nn.Module) -> nn.Module:
    return model.get_submodule(spec_of(model.config.model_type).layers)


def _weights(layer: nn.Module, block: Block) -> int:
    """The weights of a block's projections, without biases."""
    module = layer.get_submodule(block.module)
    linears = (module.get_submodule(projection.name) for projection in block.projections)
    return sum(linear.in_features * linear.out_features for linear in linears)


def _window(model: nn.Module, layer: nn.Module, context: int) -> int:
    """The keys that the last of `context` tokens sees."""
    own = getattr(layer.self_attn, "sliding_window", getattr(model.config, "sliding_window", None))
    return min(context, own or context)
