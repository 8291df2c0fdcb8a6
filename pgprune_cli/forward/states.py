"""Where the hidden states of a layer-wise run are kept: on the devices of its layers if there is room, or on the host.

A batch's states move twice per layer if they are on the host, and fits of whole blocks read them in every step. Numbers
are the same either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgprune_cli.model.devices import room_beside
from pgprune_cli.model.prunable import PrunableModel

TRAINED = 26
"""Bytes that a fit keeps for each weight: in float32 with its gradient and AdamW's means, and copies as they are
stored."""


def states_bytes(model: PrunableModel, tokens: int, copies: int = 1) -> int:
    """Return the bytes of the hidden states of some tokens, `copies` times, with a float32 number per token."""
    return tokens * (copies * model.head.weight.shape[1] * model.dtype.itemsize + 4)


def bytes_beside(model: PrunableModel, tokens: int) -> int:
    """Return the bytes that the work on one layer takes at most, with batches of `tokens` tokens.

    That is a pass through the layer, and its moments with the matrices of a solver, or a fit of all its weights.
    """
    family, hidden, itemsize = model.family, model.head.weight.shape[1], model.dtype.itemsize
    most = 0
    for layer in model.layers:
        trained = inputs = moments = width = 0
        for block in family.blocks_of(layer):
            grid, used = family.grid(layer, block), family.groups_per_token(layer, block)
            if used is None:
                *inner, output = block.linears(layer)
                widths, own = tuple(linear.out_features for linear in inner), output.in_features
                trained += sum(linear.weight.numel() for linear in (*inner, output))
                width = max(width, family.activation_width(block, hidden, widths, own))
            else:
                own = grid.members
                moments = max(moments, 4 * grid.groups * own**2)
                width = max(width, family.activation_width(block, hidden, (2 * own,) * used, own))
            inputs = max(inputs, own)
        solver = 4 * (6 * inputs**2 + 4 * inputs * hidden + 3 * hidden**2) + moments
        most = max(most, max(solver, TRAINED * trained) + tokens * (width * itemsize + 6 * inputs))
    return most


def rows_on(device: torch.device, states: Tensor, rows: Tensor) -> Tensor:
    """Return some rows `(n, …)` of hidden states on a device: the same numbers wherever the states are kept.

    From the host they get to a GPU through pinned memory, while the GPU computes. PyTorch reuses that memory only once
    the copy is done.
    """
    if states.device.type != "cpu":
        return states[rows.to(states.device, non_blocking=True)].to(device, non_blocking=True)
    staged = torch.empty(len(rows), *states.shape[1:], dtype=states.dtype, pin_memory=device.type == "cuda")
    torch.index_select(states, 0, rows, out=staged)
    return staged.to(device, non_blocking=True)


def have_room(states: int, beside: int, free: int | None) -> bool:
    """Return whether `states` and `beside` bytes together fit into `free` bytes. False if `free` is None (unknown)."""
    return free is not None and states + beside <= free


def free_for_states(model: PrunableModel) -> int | None:
    """Return the free bytes of the fullest of the model's devices, less a reserve. None if they are not known."""
    devices = {next(layer.parameters()).device for layer in model.layers}
    if any(device.type != "cuda" for device in devices):
        return None
    torch.cuda.empty_cache()
    return min(room_beside(device, 0) for device in devices)
