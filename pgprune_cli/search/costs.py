"""What a unit costs, in the measures of a budget: parameters, FLOPs, bytes of the KV cache, or time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pgprune_cli.errors import UserError
from pgprune_cli.forward.layerwise import LayerwiseRun, start_layerwise
from pgprune_cli.forward.masked import shrunk_block
from pgprune_cli.model.families.adapter import ModelFamily
from pgprune_cli.model.prunable import PrunableModel, UnitCosts
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.storage.records import read_record, write_record

WARM_UPS, REPEATS = 2, 9
"""Forward passes of a layer before any of them counts, and those whose median counts."""

Clock = Callable[[torch.device], int]
"""Returns the nanoseconds that have passed on a device."""


def flops(model: PrunableModel, context: int) -> UnitCosts:
    """Return the FLOPs per token and unit in a sequence of `context` tokens (a model on the meta device will do).

    2 per weight, and 4 · head_dim per query head and visible key, for the scores and for their sum over the values. A
    query sees (context + 1)/2 keys on average, or those of its sliding window. Biases, norms, activations and the
    softmax are not counted.
    """
    family, shape = model.family, model.shape
    costs: dict[str, list[int]] = {block.name: [] for block in family.blocks}
    for index, layer in enumerate(model.layers):
        window = family.attention_window(model.config, layer, context)
        visible_keys = window * (window + 1) // 2 + (context - window) * window  # summed over all queries
        attention = family.attention_flops(layer, visible_keys, context)
        for block in family.blocks:
            weights = sum(linear.in_features * linear.out_features for linear in block.linears(layer))
            costs[block.name].append(2 * weights // shape.units[block.name][index] + attention[block.name])
    return {name: tuple(by_layer) for name, by_layer in costs.items()}


def kv_cache(model: PrunableModel, context: int) -> UnitCosts:
    """Return the bytes per unit of the KV cache that a sequence of `context` tokens fills, in the model's dtype.

    A sliding window limits them. An FFN channel needs none.
    """
    family = model.family
    costs: dict[str, list[int]] = {block.name: [] for block in family.blocks}
    for layer in model.layers:
        window = family.attention_window(model.config, layer, context)
        for name, size in family.cache_bytes(layer, window).items():
            costs[name].append(size)
    return {name: tuple(by_layer) for name, by_layer in costs.items()}


def synchronised_clock(device: torch.device) -> int:
    """Return the time in nanoseconds, once the device has finished everything it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns()


def measure_latency(model: PrunableModel, context: int, clock: Clock = synchronised_clock) -> UnitCosts:
    """Return the nanoseconds that a unit adds to the forward pass of one sequence of `context` tokens, at least 1.

    Each block is timed with all and with half of its units, in turn, and the difference of the medians is divided by
    that of the widths: the fixed cost of a block belongs to no unit. Layers that are alike are timed once. Two
    measurements never agree exactly.
    """
    family, shape = model.family, model.shape
    tokens = torch.arange(context).unsqueeze(0) % model.config.vocab_size
    run = start_layerwise(model, [tokens], storage=model.device)
    measured: dict[Hashable, dict[str, int]] = {}
    by_layer = []
    for index, layer in enumerate(model.layers):
        linears = [linear for _, _, linear in family.linears(layer)]
        sizes = tuple((linear.weight.shape, linear.weight.dtype, linear.weight.device) for linear in linears)
        units = {name: counts[index] for name, counts in shape.units.items()}
        kind = (*sizes, *units.values(), family.attention_window(model.config, layer, context))
        if kind not in measured:
            measured[kind] = _nanoseconds_per_unit(replace(run, position=index), family, units, clock)
        by_layer.append(measured[kind])
    return {block.name: tuple(costs[block.name] for costs in by_layer) for block in family.blocks}


def latency_of_run(run: Path, model: PrunableModel, context: int, fingerprint: str) -> UnitCosts:
    """Return the latency costs of a run: read from its directory, or measured now and written there.

    Raises UserError if the file is damaged, or belongs to another model or context.
    """
    path = run / COSTS_FILE
    about = {"measure": "latency", "nanoseconds_at_tokens": context, "fingerprint": fingerprint}
    names = list(model.shape.units)
    if not path.exists():
        costs = measure_latency(model, context)
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        write_record(path, about | {"device": device} | dict(costs))
        return costs
    record = read_record(path)
    whole = all(_is_cost_list(record.get(name), model.shape.layers) for name in names)
    if not whole or any(record.get(key) != value for key, value in about.items()):
        raise UserError(
            f"{path}: damaged, or measured on another model or context. Remove the run directory to start over."
        )
    return {name: tuple(record[name]) for name in names}


def _is_cost_list(values: object, layers: int) -> bool:
    return isinstance(values, list) and len(values) == layers and all(type(ns) is int and ns > 0 for ns in values)


def _nanoseconds_per_unit(
    run: LayerwiseRun, family: ModelFamily, units: Mapping[str, int], clock: Clock
) -> dict[str, int]:
    """Time both blocks of the layer at which the run stands, by block name; `units`: how many they have."""
    widths = {1.0: dict(units), 0.5: {name: count // 2 for name, count in units.items()}}
    times: dict[float, list[dict[str, int]]] = {fraction: [] for fraction in widths}
    for _ in range(WARM_UPS + REPEATS):
        for fraction, kept in widths.items():
            masks = {name: torch.arange(count) < kept[name] for name, count in units.items()}
            times[fraction].append(_block_times(run, family, masks, clock))
    costs = {}
    for name, count in units.items():
        whole, half = (statistics.median(row[name] for row in times[fraction][WARM_UPS:]) for fraction in widths)
        costs[name] = max(1, round((whole - half) / (count - widths[0.5][name])))
    return costs


def _block_times(run: LayerwiseRun, family: ModelFamily, masks: Mapping[str, Tensor], clock: Clock) -> dict[str, int]:
    """Return the nanoseconds that each block takes on its kept units, without the time to gather them."""
    layer = run.layers[run.position]
    device = next(layer.parameters()).device
    readings: dict[str, list[int]] = {name: [] for name in masks}
    with ExitStack() as undo:
        for block in family.blocks:
            undo.enter_context(shrunk_block(family, layer, block, masks[block.name], None))

            def read_clock(module: nn.Module, *_: object, name: str = block.name) -> None:
                readings[name].append(clock(device))

            module = layer.get_submodule(block.module)
            # The first hook runs after the units are gathered, the second before the dense weights are restored.
            undo.callback(module.register_forward_pre_hook(read_clock).remove)
            undo.callback(module.register_forward_hook(read_clock, prepend=True).remove)
        run.observe(run.position, {})
    return {name: end - start for name, (start, end) in readings.items()}
