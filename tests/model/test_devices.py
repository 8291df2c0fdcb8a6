"""Which devices a process has, how many of them a model needs, and which of its layers lies where."""

import pytest
import torch
from helpers.models import tiny_model

from pgprune_cli.errors import UserError
from pgprune_cli.model.devices import device_map, devices_needed, devices_of


def test_devices_by_name():
    assert devices_of("cpu") == [torch.device("cpu")]
    assert devices_of("auto") == [torch.device("cuda" if torch.cuda.is_available() else "cpu")]


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine with as many, and one process of `started(rank, world)` that torchrun started on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def started(rank: int, world: int) -> None:
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}.items():
            monkeypatch.setenv(name, str(value))

    return started


def indices(device: str) -> list[int]:
    return [found.index for found in devices_of(device)]


def test_processes_share_the_gpus_of_their_machine(eight_gpus):
    assert (indices("auto"), indices("cuda")) == (list(range(8)), [0])
    for rank in range(4):
        eight_gpus(rank, 4)
        assert indices("auto") == [2 * rank, 2 * rank + 1]
        assert indices("cuda") == [2 * rank]
        assert indices("cuda:1,cuda:3,cuda:5,cuda:7") == [2 * rank + 1]
        assert devices_of("cpu") == [torch.device("cpu")]


def test_more_processes_than_gpus_are_refused(eight_gpus):
    eight_gpus(8, 9)
    with pytest.raises(UserError, match="9 processes on this machine and 8 CUDA devices for them; start fewer"):
        devices_of("auto")
    with pytest.raises(UserError, match="9 processes on this machine and 1 CUDA devices"):
        devices_of("cuda:3")


@pytest.mark.parametrize(
    ("weights", "free", "count"),
    [(80, [100, 100], 1), (81, [100, 100], 2), (161, [100, 100, 100], 3), (90, [100, 20, 100], 3), (999, [100] * 4, 4)],
)
def test_auto_takes_as_many_gpus_as_the_weights_need(weights, free, count):
    """Of the fourth, the second is nearly full, and layers are device_map evenly."""
    assert devices_needed(weights, free) == count


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda:0, cuda:1") == [torch.device("cuda:0"), torch.device("cuda:1")]
    for device in ("cuda:2", "cuda:0,cuda:2"):
        with pytest.raises(UserError) as caught:
            devices_of(device)
        assert str(caught.value) == "device cuda:2: this machine has 2 CUDA devices"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="device cuda: this machine has 0 CUDA devices"):
        devices_of("cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu,", "cuda:-1"])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(UserError) as caught:
        devices_of(device)
    assert str(caught.value).startswith("device ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("layers", "count"), [(32, 2), (7, 3), (4, 4), (2, 3), (1, 1)])
def test_layers_are_spread_evenly_and_in_order(layers, count, tied):
    devices = [torch.device("cuda", index) for index in range(count)]
    places = device_map(layers, tied, devices)
    order = [places.pop(f"model.layers.{index}").index for index in range(layers)]
    assert order == sorted(order)
    sizes = [order.count(index) for index in range(count)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == layers
    first, last = devices[0], devices[-1]
    ends = {
        "model.embed_tokens": last if tied else first,
        "model.rotary_emb": first,
        "model.norm": last,
        "lm_head": last,
    }
    assert places == ends


def test_a_spread_names_every_part_of_a_model():
    """What accelerate has no place for, it refuses to load."""
    model = tiny_model("llama-mha")
    places = device_map(4, False, [torch.device("cpu")])
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{module}.") for module in places) == 1, name
