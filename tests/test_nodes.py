"""One search on two simulated nodes: two torchrun agents give the bits of one process, also after one was cut off."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.nodes import ADDRESSES, NAMESPACES, free_port, kill, network_refusal, set_link, start_agent, two_namespaces
from helpers.one_search import SECONDS, STEPS, arguments, result_of
from helpers.torchrun_program import WAITING
from helpers.waiting import wait_until

from pgprune_cli.run.checkpoint import latest_checkpoint

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the agent of a node, `start(node, endpoint, accident, **more)`. In the end its processes are killed."""
    agents: list[subprocess.Popen] = []
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number of them may sum in another order

    def begin(node: int, endpoint: str, accident: str, variables: dict[str, str] | None = None, **more: object):
        program = [accident, "3", "search", *arguments(tmp_path / "run")]
        log = tmp_path / f"node-{node}.log"
        agents.append(
            start_agent(endpoint, program, is_host=node == 0, variables=threads | (variables or {}), log=log, **more)
        )
        return agents[-1]

    yield begin
    for agent in agents:
        kill(agent)


def assert_finished(agents: list[subprocess.Popen], folder: Path) -> None:
    codes = [agent.wait(SECONDS) for agent in agents]
    assert not any(codes), "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


@pytest.mark.parametrize("processes", [(1, 1), (1, 2)], ids=str)
def test_two_nodes_find_what_one_process_does(processes: tuple[int, int], alone, start: Start, tmp_path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [start(node, endpoint, "none", processes=count) for node, count in enumerate(processes)]
    assert_finished(agents, tmp_path)
    assert result_of(tmp_path / "run") == alone


@pytest.mark.soak
@pytest.mark.parametrize("cut", ["link", "node"])
def test_a_node_that_is_cut_off_costs_nothing_but_time(cut: str, alone, start: Start, tmp_path) -> None:
    """Two network namespaces. In the middle of the search the link fails, and both nodes are stopped and started again;
    or one node fails with all its processes, and the other continues without it."""
    if refusal := network_refusal():
        pytest.skip(refusal)
    run = tmp_path / "run"

    def begin(accident: str) -> list[subprocess.Popen]:
        return [
            start(
                node,
                f"{ADDRESSES[0]}:29400",
                accident,
                nodes="1:2",
                address=ADDRESSES[node],
                inside=["ip", "netns", "exec", NAMESPACES[node]],
                variables={"GLOO_SOCKET_IFNAME": ("pgprune-a", "pgprune-b")[node]},
            )
            for node in (0, 1)
        ]

    with two_namespaces():
        agents = begin("wait")
        wait_until((run / WAITING).exists, agents[1])
        if cut == "node":
            kill(agents[1])
            assert_finished(agents[:1], tmp_path)
        else:
            set_link(up=False)
            for agent in agents:
                kill(agent)
            assert latest_checkpoint(run).state.step == 2
            set_link(up=True)
            assert_finished(begin("none"), tmp_path)
    assert f"resuming from step 2 of {STEPS}" in (tmp_path / "node-0.log").read_text()
    assert result_of(run) == alone
