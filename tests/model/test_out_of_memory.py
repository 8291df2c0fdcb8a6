"""Running out of memory is recognised in all its forms, and equations that a GPU cannot hold are solved elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers.messages import refused, says
from torch import Tensor

from pgprune_cli.core.grid import Grid, GridCost
from pgprune_cli.errors import RunError
from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.moments import Moments
from pgprune_cli.model import out_of_memory
from pgprune_cli.model.out_of_memory import is_out_of_memory, or_on_cpu
from pgprune_cli.repair.equations import repaired_output, solve_prefixes
from pgprune_cli.scores.obs import chain_errors, removal_order

FAILURES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 484.00 MiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: error code 12"),
)


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_every_failed_allocation_is_recognised_and_halves_a_batch(error: RuntimeError) -> None:
    assert is_out_of_memory(error)
    sizes = []

    def run(part: slice) -> None:
        sizes.append(part.stop - part.start)
        if sizes[-1] > 2:
            raise error

    BatchSplitter().run_slices(4, run)
    assert sizes == [4, 2, 2]


@pytest.mark.parametrize("text", ["CUSOLVER_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_NOT_INITIALIZED"])
def test_an_unclear_failure_counts_only_while_no_memory_is_left(text: str, monkeypatch) -> None:
    error = RuntimeError(f"cusolver error: {text}, when calling `cusolverDnCreate(handle)`.")
    assert not is_out_of_memory(error)
    monkeypatch.setattr(out_of_memory, "_least_free", lambda: 10**6)
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_of_a_solver_are_raised_as_they_are() -> None:
    def solve(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("singular")

    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        or_on_cpu(solve, torch.zeros(2, 2))


def test_equations_that_a_device_cannot_hold_are_solved_on_the_cpu(capsys) -> None:
    """The meta device stands for a GPU; its tensors have no values, so the copy is made up."""

    class OnGpu(Tensor):
        def cpu(self) -> Tensor:
            return torch.ones(self.shape)

    def solve(matrix: Tensor) -> Tensor:
        if matrix.device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return matrix + 1

    solved = or_on_cpu(solve, torch.zeros(3, 3, device="meta").as_subclass(OnGpu))
    assert solved.tolist() == [[2.0] * 3] * 3
    said = capsys.readouterr().err
    assert said.startswith("pgprune: meta: ")
    says(said, "(3, 3)", "The CPU solves them")


def solvers() -> dict[str, object]:
    weight, moments = torch.randn(3, 8), Moments(torch.eye(8), torch.zeros(8), torch.ones(()))
    columns, root = torch.arange(6), torch.eye(3)
    return {
        "obs": lambda: removal_order(weight, moments.second, 4),
        "obs of a grid": lambda: chain_errors(weight, moments.second, Grid(2, 2, shared_rows=True), GridCost(1)),
        "repair": lambda: repaired_output(weight, None, moments, columns, 0.01, with_bias=True),
        "width table": lambda: solve_prefixes(
            weight, moments.second, torch.arange(8), [0, 4, 8], root, 0.0, solve=True
        ),
    }


@pytest.mark.parametrize("name", solvers())
def test_a_solver_without_memory_says_so_in_one_line(name: str, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail)
    with refused("out of memory while solving", "(8, 8)", error=RunError):
        solvers()[name]()
