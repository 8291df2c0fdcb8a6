"""One search on several processes: the same result, bit for bit, whatever happens to one of them; and no hanging."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.messages import says
from helpers.one_search import RECIPE, SECONDS, STEPS, arguments, result_of

from pgprune_cli import distributed
from pgprune_cli.cli import program as cli
from pgprune_cli.distributed import Ranks, join, ranks_from_environment, ranks_of_this_machine
from pgprune_cli.errors import RunError
from pgprune_cli.jobs.search import search
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import DECISION_RECORD


def run_program(program: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # Threads as this process has: another number of them may sum in another order.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | variables
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=SECONDS, env=environment)


def torchrun(run: Path, accident: str, step: int | str, restarts: int = 0):
    """The program on two processes under torchrun, with an accident to rank 1 after a step or in the repair."""
    what = [str(Path(__file__).parent / "helpers" / "torchrun_program.py"), accident, str(step)]
    started = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return run_program([sys.executable, "-m", "torch.distributed.run", *started, *what, "search", *arguments(run)], {})


def test_four_processes_that_the_slurm_script_starts_find_what_one_does(alone, tmp_path) -> None:
    """With a cluster of one machine, which is this one."""
    for name, does in {"srun": 'exec "$@"', "scontrol": "echo localhost"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(os.getpid()), "PROCESSES": "4"}
    path = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = Path(__file__).parents[1] / "scripts" / "slurm" / "search.sbatch"
    done = run_program(["bash", str(script), *arguments(tmp_path / "run")], job | path)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run") == alone
    assert done.stdout.count("\n") == 1  # the writer's
    assert done.stderr.count(f"step {STEPS}/{STEPS}") == 1
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("place", "saved"), [(3, 2), ("repair", STEPS)])
def test_a_killed_rank_costs_nothing_but_time(place: int | str, saved: int, alone, tmp_path) -> None:
    """Killed after step 3, the checkpoint being of step 2, or while both repair: torchrun restarts all from there."""
    done = torchrun(tmp_path, "SIGKILL", place, restarts=1)
    assert done.returncode == 0, done.stderr
    assert f"from step {saved} of {STEPS}" in done.stderr
    assert result_of(tmp_path) == alone


def test_a_signal_to_one_rank_stops_all_with_their_step_saved(alone, tmp_path) -> None:
    done = torchrun(tmp_path, "SIGTERM", 3)
    assert done.returncode != 0
    for rank in (0, 1):
        saved = f"step 3 of {STEPS} is saved in {tmp_path}"
        said = f"pgprune, rank {rank}: stopped: {saved}. Resume with: the same torchrun"
        assert said in done.stderr
    assert latest_checkpoint(tmp_path).state.step == 3
    search(load(find("demo"), RECIPE), tmp_path)  # by itself, this time
    assert result_of(tmp_path) == alone


@pytest.mark.parametrize("place", [2, "repair"])
def test_an_exception_on_one_rank_ends_all(place: int | str, tmp_path) -> None:
    done = torchrun(tmp_path, "exception", place)
    assert done.returncode != 0
    assert "ArithmeticError: an accident" in done.stderr
    assert not (tmp_path / DECISION_RECORD).exists()


# --- without the search: three processes and a few numbers

EXCHANGE = """
import json, os, sys, torch
from pgprune_cli.distributed import join
from pgprune_cli.errors import RunError
found = {}
try:
    with join() as ranks:
        values = torch.tensor([0.1, float("nan"), float("-inf"), 1e300, 5e-324, -0.1, 1 / 3], dtype=torch.float64)
        found["few"] = ranks.gather(values[:2][list(ranks.share(2))], 2).view(torch.int64).tolist()
        found["all"] = ranks.gather(values[list(ranks.share(7))], 7).view(torch.int64).tolist()
        found["expected"] = values.view(torch.int64).tolist()
        found["greatest"] = ranks.max(15 if ranks.rank == 1 else 0)
        with ranks.run_writer_first():
            if ranks.is_writer:
                open(sys.argv[1], "w").write("whole")
            found["read"] = open(sys.argv[1]).read()
        ranks.check_same(values, torch.arange(3))
        try:
            ranks.check_same(torch.arange(3) == (2 if ranks.rank == 2 else 1))
        except RunError as error:
            found["different"] = str(error)
        if ranks.rank == 2:
            print(json.dumps(found), flush=True)
            os._exit(1)
        ranks.barrier()
except RunError as error:
    found["gone"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    file = tmp_path_factory.mktemp("exchange") / "file"
    for rank in range(3):
        place = {"RANK": str(rank), "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "test"}
        environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        program = [sys.executable, "-c", EXCHANGE, str(file)]
        started.append(
            subprocess.Popen(program, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        ended = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(out for out, _ in ended), [err for _, err in ended]
    return [json.loads(out) for out, _ in ended]


def test_losses_reach_every_rank_bit_for_bit_in_order(exchanged) -> None:
    for actual in exchanged:
        assert actual["all"] == actual["expected"]
        assert actual["few"] == actual["expected"][:2]  # of three ranks one had none


def test_a_signal_of_one_rank_is_every_ranks(exchanged) -> None:
    assert [actual["greatest"] for actual in exchanged] == [15, 15, 15]


def test_what_the_writer_wrote_first_the_others_find(exchanged) -> None:
    assert [actual["read"] for actual in exchanged] == ["whole"] * 3


def test_ranks_of_different_searches_are_refused_by_all(exchanged) -> None:
    said = [actual["different"].partition(" are not running the same search")[0] for actual in exchanged]
    assert said == ["rank 0 and rank 2", "rank 1 and rank 2", "rank 2 and rank 0"]


def test_a_rank_that_is_gone_is_an_error_of_the_others(exchanged) -> None:
    for actual in exchanged[:2]:
        assert actual["gone"].startswith("another process of this run has died (")


# --- one process


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 16, 17])
def test_shares_are_a_fair_partition(count, world) -> None:
    shares = [list(Ranks(rank, world).share(count)) for rank in range(world)]
    assert sorted(piece for share in shares for piece in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_torchrun_there_is_one_process_and_no_group(monkeypatch) -> None:
    """Also where a cluster has set the variables that it would read."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ranks_from_environment() == ranks_of_this_machine() == Ranks(0, 1)
    with join() as ranks:
        assert not torch.distributed.is_initialized()
        assert ranks.is_writer
        assert ranks.max(3) == 3


@pytest.fixture
def second_of_two(monkeypatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("verb", ["init-scores", "export", "compare", "recipes"])
def test_torchrun_is_for_search(verb, second_of_two, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", ["pgprune", verb, "x"][: 2 if verb == "recipes" else 3])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    says(capfd.readouterr().err, f"pgprune, rank 1: {verb}: ", "torchrun")


@pytest.mark.parametrize(
    ("backend", "error", "leaves"),
    [
        ("gloo", ValueError("only here"), True),
        ("gloo", RunError("another process has died"), False),
        ("cpu:gloo,cuda:nccl", ValueError("only here"), False),
        ("cpu:gloo,cuda:nccl", KeyboardInterrupt(), False),
        ("cpu:gloo,cuda:nccl", Interrupted(15, 3), True),
        ("cpu:gloo,cuda:nccl", None, True),
    ],
)
def test_a_process_that_fails_alone_never_waits_for_the_others(backend, error, leaves, monkeypatch) -> None:
    """To leave a group with NCCL is to wait for all of its processes, which are in the middle of a sum."""
    left = []
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_private_store", lambda ranks: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))

    def work() -> None:
        with join(backend, common=(Interrupted,)):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert bool(left) is leaves
