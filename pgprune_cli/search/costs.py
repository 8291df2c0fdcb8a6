"""What elements and groups cost, in the measures of a budget: FLOPs, bytes of the KV cache, or time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid, GridCost, first_elements
from pgprune_cli.errors import UserError
from pgprune_cli.forward.layerwise import LayerwiseRun, start_layerwise
from pgprune_cli.forward.shrunk_block import shrunk_block
from pgprune_cli.model.families.adapter import ModelFamily, tensor_shape
from pgprune_cli.model.prunable import BlockCosts, PrunableModel, grid_cost
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.storage.records import read_record, write_record

WARM_UPS, REPEATS = 2, 9
"""Forward passes of a layer before any of them counts, and those whose median counts."""

Clock = Callable[[torch.device], int]
"""Returns the nanoseconds that have passed on a device."""


def flops(model: PrunableModel, context: int) -> BlockCosts:
    """Return the FLOPs per token in a sequence of `context` tokens (a model on the meta device will do).

    2 per weight, and 4 · head_dim per query head and visible key, for the scores and for their sum over the values. A
    query sees (context + 1)/2 keys on average, or those of its sliding window. Biases, norms, activations and the
    softmax are not counted.
    """
    family, shape = model.family, model.shape
    costs: dict[str, list[GridCost]] = {block.name: [] for block in family.blocks}
    for index, layer in enumerate(model.layers):
        window = family.attention_window(model.config, layer, context)
        visible_keys = window * (window + 1) // 2 + (context - window) * window  # summed over all queries
        present = shape.blocks[index]
        attention = family.attention_flops(layer, visible_keys, context) if family.attention.name in present else {}
        for name in costs:
            if name not in present:
                costs[name].append(GridCost(0))
                continue
            block = present[name]
            module = layer.get_submodule(block.module)
            matrices = [
                tensor
                for tensor in family.unit_tensors(layer, block)
                if len(tensor_shape(module, tensor.name)) - tensor.stacked > 1
            ]
            weights = grid_cost(shape.grids[name][index], module, matrices, family.groups_per_token(layer, block))
            products = GridCost(2 * weights.element + attention.get(name, 0), 2 * weights.group, 2 * weights.member)
            costs[name].append(products)
    return {name: tuple(by_layer) for name, by_layer in costs.items()}


def active_parameters(model: PrunableModel) -> BlockCosts:
    """Return the parameters that one token uses: of a mixture of experts, those of the experts that a router picks.

    Their number stays the same while experts are removed, so an expert costs just its router row.
    """
    family, shape = model.family, model.shape
    costs: dict[str, list[GridCost]] = {block.name: [] for block in family.blocks}
    for index, layer in enumerate(model.layers):
        for name in costs:
            block = shape.blocks[index].get(name)
            if block is None:
                costs[name].append(GridCost(0))
                continue
            module, tensors = layer.get_submodule(block.module), family.unit_tensors(layer, block)
            used = family.groups_per_token(layer, block)
            costs[name].append(grid_cost(shape.grids[name][index], module, tensors, used))
    return {name: tuple(by_layer) for name, by_layer in costs.items()}


def kv_cache(model: PrunableModel, context: int) -> BlockCosts:
    """Return the bytes of the KV cache that a sequence of `context` tokens fills, in the model's dtype.

    Every KV head needs as much, however many query heads share it. A sliding window limits it. An FFN needs none. The
    state of a recurrent layer counts too: it is the same for every number of tokens.
    """
    family = model.family
    costs: dict[str, list[GridCost]] = {block.name: [] for block in family.blocks}
    for layer in model.layers:
        window = family.attention_window(model.config, layer, context)
        has_attention = any(block.name == family.attention.name for block in family.blocks_of(layer))
        cache = family.cache_bytes(layer, window) if has_attention else {}
        for name, by_layer in costs.items():
            by_layer.append(GridCost(0, cache.get(name, 0)))
    return {name: tuple(by_layer) for name, by_layer in costs.items()}


def synchronised_clock(device: torch.device) -> int:
    """Return the time in nanoseconds, once the device has finished everything it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns()


def measure_latency(model: PrunableModel, context: int, clock: Clock = synchronised_clock) -> BlockCosts:
    """Return the nanoseconds that elements and groups add to the forward pass of one sequence of `context` tokens.

    Each block is timed as a whole, with half of its groups, and with half of the members of each group, in turn. The
    differences of the medians say what an element and what a group costs (an element at least 1): the fixed cost of a
    block belongs to neither. Layers that are alike are timed once. Two measurements never agree exactly.
    """
    family, shape = model.family, model.shape
    tokens = torch.arange(context).unsqueeze(0) % model.config.vocab_size
    run = start_layerwise(model, [tokens], storage="devices")
    measured: dict[Hashable, dict[str, GridCost]] = {}
    by_layer = []
    for index, layer in enumerate(model.layers):
        blocks = shape.blocks[index]
        tensors = [tensor for block in blocks.values() for tensor in layer.get_submodule(block.module).parameters()]
        sizes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        grids = {name: shape.grids[name][index] for name in blocks}
        kind = (*sizes, *blocks.values(), *grids.values(), family.attention_window(model.config, layer, context))
        if kind not in measured:
            measured[kind] = _nanoseconds(replace(run, position=index), family, grids, clock)
        by_layer.append(measured[kind])
    # A block that a layer lacks has no elements, so it costs nothing.
    return {block.name: tuple(costs.get(block.name, GridCost(1)) for costs in by_layer) for block in family.blocks}


def latency_of_run(run: Path, model: PrunableModel, context: int, fingerprint: str) -> BlockCosts:
    """Return the latency costs of a run: read from its directory, or measured now and written there.

    Raises UserError if the file is damaged, or belongs to another model or context.
    """
    path = run / COSTS_FILE
    about = {"measure": "latency", "nanoseconds_at_tokens": context, "fingerprint": fingerprint}
    names = list(model.shape.grids)
    if not path.exists():
        costs = measure_latency(model, context)
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        rows = {
            name: [[cost.element, cost.group, cost.member] for cost in by_layer] for name, by_layer in costs.items()
        }
        write_record(path, about | {"device": device} | rows)
        return costs
    record = read_record(path)
    whole = all(is_cost_list(record.get(name)) and len(record[name]) == model.shape.layers for name in names)
    if not whole or any(record.get(key) != value for key, value in about.items()):
        raise UserError(
            f"{path}: damaged, or measured on another model or context. Remove the run directory to start over."
        )
    return {name: tuple(GridCost(*cost) for cost in record[name]) for name in names}


def is_cost_list(values: Any) -> bool:
    """Return whether a value from a record is a list of costs, layer by layer: of an element, a group and a member."""
    return (
        isinstance(values, list)
        and all(isinstance(cost, list) and len(cost) == 3 for cost in values)
        and all(type(part) is int and part >= 0 for cost in values for part in cost)
        and all(element or member for element, _, member in values)
    )


def _nanoseconds(
    run: LayerwiseRun, family: ModelFamily, grids: Mapping[str, Grid], clock: Clock
) -> dict[str, GridCost]:
    """Time the blocks of the layer at which the run stands, by block name."""
    kept = {
        "whole": {name: (grid.groups, grid.members) for name, grid in grids.items()},
        "groups": {name: (max(grid.groups // 2, grid.min_groups), grid.members) for name, grid in grids.items()},
        "members": {name: (grid.groups, max(grid.members // 2, 1)) for name, grid in grids.items()},
    }
    kept["both"] = {name: (kept["groups"][name][0], kept["members"][name][1]) for name in grids}
    if not any(grid.separate for grid in grids.values()):
        del kept["both"]
    times: dict[str, list[dict[str, int]]] = {part: [] for part in kept}
    for _ in range(WARM_UPS + REPEATS):
        for part, sizes in kept.items():
            masks = {name: first_elements(grids[name], *size) for name, size in sizes.items()}
            times[part].append(_block_times(run, family, masks, clock))
    costs = {}
    for name, grid in grids.items():
        median = {part: statistics.median(row[name] for row in rows[WARM_UPS:]) for part, rows in times.items()}
        fewer = grid.groups - kept["groups"][name][0], grid.members - kept["members"][name][1]
        costs[name] = (_cost_of_experts if grid.separate else _cost_of_grid)(median, grid, *fewer)
    return costs


def _cost_of_grid(median: Mapping[str, float], grid: Grid, fewer_groups: int, fewer_members: int) -> GridCost:
    by_member = (median["whole"] - median["members"]) / (grid.groups * fewer_members) if fewer_members else 0.0
    by_group = (median["whole"] - median["groups"]) / fewer_groups if fewer_groups else 0.0
    if grid.members == 1:
        return GridCost(max(1, round(by_group)))
    return GridCost(max(1, round(by_member)), max(0, round(by_group - by_member * grid.members)))


def _cost_of_experts(median: Mapping[str, float], grid: Grid, fewer_groups: int, fewer_members: int) -> GridCost:
    """Return the costs of experts: products depend on the channels alone, weights to be read on experts × channels."""
    both = fewer_groups * fewer_members
    by_element = (median["whole"] - median["groups"] - median["members"] + median["both"]) / both if both else 0.0
    element = max(0, round(by_element))
    by_group = (median["whole"] - median["groups"]) / fewer_groups if fewer_groups else 0.0
    by_member = (median["whole"] - median["members"]) / fewer_members if fewer_members else 0.0
    group, member = by_group - element * grid.members, by_member - element * grid.groups
    return GridCost(element, max(1, round(group)), max(1, round(member)))


def _block_times(run: LayerwiseRun, family: ModelFamily, masks: Mapping[str, Tensor], clock: Clock) -> dict[str, int]:
    """Return the nanoseconds that each block takes on its kept elements, without the time to gather them."""
    layer = run.layers[run.position]
    device = next(layer.parameters()).device
    readings: dict[str, list[int]] = {name: [] for name in masks}
    with ExitStack() as undo:
        for block in family.blocks_of(layer):
            undo.enter_context(shrunk_block(family, layer, block, masks[block.name], None))

            def read_clock(module: nn.Module, *_: object, name: str = block.name) -> None:
                readings[name].append(clock(device))

            module = layer.get_submodule(block.module)
            # The first hook runs after the elements are gathered, the second before the dense weights are restored.
            undo.callback(module.register_forward_pre_hook(read_clock).remove)
            undo.callback(module.register_forward_hook(read_clock, prepend=True).remove)
        run.observe(run.position, {})
    return {name: end - start for name, (start, end) in readings.items()}
