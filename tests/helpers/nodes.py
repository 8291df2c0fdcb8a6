"""torchrun on two simulated nodes: two agents that meet at an address, each started by a command of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

PROGRAM = Path(__file__).parent / "torchrun_program.py"


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def start_agent(
    endpoint: str,
    arguments: Sequence[str],
    *,
    is_host: bool,
    processes: int = 1,
    nodes: str = "2",
    address: str = "127.0.0.1",
    inside: Sequence[str] = (),
    variables: Mapping[str, str] = {},
    log: Path,
) -> subprocess.Popen[bytes]:
    """Start the agent of one node in a process group of its own.

    endpoint: where the agents meet; arguments: of `torchrun_program.py`; is_host: whether this agent serves the
    meeting point; nodes: how many there may be; address: of this node; inside: a command that runs another one, such as
    `ip netns exec NAME`; log: a file for what it prints.
    """
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", endpoint]
    meeting += ["--rdzv-conf", f"is_host={int(is_host)},last_call_timeout=10", "--local-addr", address]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", str(processes)]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*inside, *torchrun, "--max-restarts", "1", *meeting, str(PROGRAM), *arguments],
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent and the processes that it has started."""
    if agent.poll() is None:
        for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    agent.wait()


NAMESPACES = ("pgprune-0", "pgprune-1")
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def network_refusal() -> str | None:
    """Return why this machine cannot have network namespaces, None if it can."""
    if shutil.which("ip") is None:
        return "the command ip is missing"
    tried = subprocess.run(["ip", "netns", "add", "pgprune-tried"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", "pgprune-tried"], capture_output=True, check=False)
    return f"ip netns: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def two_namespaces() -> Iterator[None]:
    """Inside the `with`, there are two network namespaces, NAMESPACES, with a link between them, at ADDRESSES."""
    ends = ("pgprune-a", "pgprune-b")
    with ExitStack() as undo:
        for name in NAMESPACES:
            ip("netns", "add", name)
            undo.callback(ip, "netns", "delete", name)
        ip("link", "add", ends[0], "netns", NAMESPACES[0], "type", "veth", "peer", ends[1], "netns", NAMESPACES[1])
        for name, end, address in zip(NAMESPACES, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield


def set_link(up: bool) -> None:
    """Set the link between the namespaces up or down."""
    ip("-n", NAMESPACES[1], "link", "set", "pgprune-b", "up" if up else "down")


def ip(*arguments: str) -> None:
    """Run the command ip."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
