"""The table of GPUs, and where a search is placed on them."""

from __future__ import annotations

import pytest
import torch
from helpers.messages import refused

from pgprune_cli.estimate.machines import GPUS, gpu
from pgprune_cli.estimate.placement import Need, Placement, place, share_of_table


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_reaches_fractions_of_its_data_sheet(name: str) -> None:
    sheet, machine = GPUS[name], gpu(name)
    assert 0.5 < machine.flops_per_second[torch.bfloat16] / (1e12 * sheet.bfloat16) < 0.9
    assert 0.7 < machine.memory_bandwidth / (1e9 * sheet.memory) < 0.9
    assert 0.9 < machine.memory / (sheet.gibibytes * 2**30) < 1
    rates = [machine.flops_per_second[dtype] for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", ["a100-80gb", "h100-80gb", "h200-141gb"])
def test_tensor_cores_multiply_float64_as_fast_as_others_multiply_float32(name: str) -> None:
    rates = gpu(name).flops_per_second
    assert rates[torch.float64] == rates[torch.float32]


def test_a_gpu_that_is_not_in_the_table_is_refused() -> None:
    with refused("--on", "tpu", "h100-80gb"):
        gpu("tpu")


@pytest.mark.parametrize(
    ("room", "gpus", "expected"),
    [
        (130, 1, Placement(1, 1, "whole")),
        (129, 1, Placement(1, 1, "parts")),
        (109, 1, Placement(1, 1, "no")),
        (80, 8, Placement(2, 4, "whole")),
        (80, 3, Placement(2, 1, "whole")),
        (43, 8, Placement(8, 1, "whole")),
        (42, 8, Placement(4, 2, "parts")),
        (1000, 64, Placement(1, 16, "whole")),
    ],
)
def test_a_model_gets_as_few_gpus_as_suffice_and_the_others_get_copies(
    room: int, gpus: int, expected: Placement
) -> None:
    assert place(Need(weights=100, beside=30, least=10, step=5, host=0), room, gpus, most_processes=16) == expected


@pytest.mark.parametrize(("room", "kept"), [(101, 1), (100, 1), (99, 0.69), (60, 0.3), (30, 0), (5, 0), (-10, 0)])
def test_a_table_without_room_shares_it_with_the_buffers_of_a_ring(room: float, kept: float) -> None:
    assert share_of_table(100, room, ring=30) == pytest.approx(kept)
    assert share_of_table(0, room, ring=0) == 1  # there is no table
