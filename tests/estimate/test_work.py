"""Seconds from work and rates: what overlaps on a GPU, and what a CPU does one after the other."""

from __future__ import annotations

import pytest
import torch

from pgprune_cli.estimate import work as module
from pgprune_cli.estimate.flops import Flops
from pgprune_cli.estimate.machines import Machine
from pgprune_cli.estimate.work import Seconds, Work, phase_seconds

RATES = {torch.bfloat16: 100.0, torch.float32: 10.0}
CPU, GPU = Machine(RATES, 10.0), Machine(RATES, 10.0, pcie=5.0)


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPERATION", 1.0)
    monkeypatch.setattr(module, "DISK", 4.0)
    monkeypatch.setattr(module, "PAGEABLE", 3.0)
    monkeypatch.setattr(module, "STAGED", 4.0)


@pytest.mark.parametrize(
    ("work", "on_cpu", "on_gpu"),
    [
        (Work(Flops({torch.bfloat16: 300, torch.float32: 20})), 5, 5),
        (Work(Flops({torch.float32: 20}), weights=50), 5, 5),  # reading takes longer than multiplying
        (Work(Flops({torch.float32: 20}), weights=10, traffic=30), 5, 5),
        (Work(Flops({torch.float32: 20}), operations=3), 5, 3),
        (Work(Flops({torch.float32: 20}), copied=40), 2, 8),
        (Work(Flops({torch.float32: 20}), copied=40, staged=20), 2, 8),
        (Work(Flops({torch.float32: 20}), copied=40, staged=40), 2, 10),  # by a thread, behind which the copies wait
        (Work(Flops({torch.float32: 20}), awaited=12), 2, 2 + 4),
        (Work(Flops({torch.float32: 20}), copied=40, awaited=12), 2, 8 + 4),
        (Work(Flops({torch.float32: 20}), disk=12), 3, 3),
    ],
)
def test_a_gpu_computes_while_the_host_and_the_copies_go_on(work: Work, on_cpu: float, on_gpu: float) -> None:
    assert Seconds.of(work, CPU).elapsed(CPU) == on_cpu
    assert Seconds.of(work, GPU).elapsed(GPU) == on_gpu


def test_a_phase_takes_the_sum_of_its_parts_and_names_what_is_busy_longest() -> None:
    parts = [Work(Flops({torch.float32: 20}), copied=5), Work(copied=25), Work(operations=1)]
    phase = phase_seconds({"steps": parts}, GPU)["steps"]
    assert phase == {"seconds": 8, "bound": "pcie", "products": 2, "memory": 0, "pcie": 6, "disk": 0, "host": 1}


def test_work_adds_up_and_is_divided_in_whole_parts() -> None:
    work = Work(Flops({torch.float32: 160}), copied=16)
    assert work + work == work.times(2)
    assert work.divided(16, 8) == Work(Flops({torch.float32: 20}), copied=2)
    assert work.divided(16, 6) == work.divided(16, 7) == Work(Flops({torch.float32: 30}), copied=3)
    assert work.divided(16, 1) == work
