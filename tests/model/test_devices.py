"""Which devices a process has, how many of them a model needs, and which layer is where."""

import pytest
import torch
from helpers.messages import refused
from helpers.models import tiny_model

from pgprune_cli.model.devices import device_map, devices_of, emptiest, fastest_dtype, memory_in_use
from pgprune_cli.model.families.llama import LLAMA


def test_devices_of_names_the_cpu_and_the_default():
    assert devices_of("cpu") == [torch.device("cpu")]
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    assert devices_of("auto") == (gpus or [torch.device("cpu")])


def test_memory_in_use_is_that_of_all_gpus(monkeypatch):
    assert memory_in_use() > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: [10, 32][index])
    assert memory_in_use() == 42


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine with 8 GPUs. Returns a function that makes this one of the processes started by torchrun."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def started(rank: int, world: int) -> None:
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}.items():
            monkeypatch.setenv(name, str(value))

    return started


def indices(device: str) -> list[int]:
    return [gpu.index for gpu in devices_of(device)]


def test_processes_share_the_gpus_of_their_machine(eight_gpus):
    assert (indices("auto"), indices("cuda")) == (list(range(8)), [0])
    for rank in range(4):
        eight_gpus(rank, 4)
        assert indices("auto") == [rank, rank + 4]  # the first one is what accelerate trains on
        assert indices("cuda") == [rank]
        assert indices("cuda:1,cuda:3,cuda:5,cuda:7") == [2 * rank + 1]
        assert devices_of("cpu") == [torch.device("cpu")]


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_every_gpu_belongs_to_one_process(eight_gpus, processes):
    shares = []
    for rank in range(processes):
        eight_gpus(rank, processes)
        shares.append(indices("auto"))
    assert sorted(index for share in shares for index in share) == list(range(8))
    assert [share[0] for share in shares] == list(range(processes))


def test_more_processes_than_gpus_are_refused(eight_gpus):
    eight_gpus(8, 9)
    with refused("9 processes", "8 CUDA devices"):
        devices_of("auto")
    with refused("9 processes", "1 CUDA device"):
        devices_of("cuda:3")


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fastest_dtype_is_bfloat16_where_the_device_has_instructions_for_it(
    device, has_bfloat16, eight_gpus, monkeypatch
):
    gpu, cpu = (has_bfloat16, False) if device == "auto" else (False, has_bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
    assert fastest_dtype(device) == ("bfloat16" if has_bfloat16 else "float32")


@pytest.mark.parametrize(
    ("weights", "beside", "free", "chosen"),
    [
        (80, None, [100, 100], [0]),
        (81, None, [100, 100], [0, 1]),
        (90, None, [100, 20, 100], [0, 2]),  # not the GPU that is nearly full
        (50, 10, [30, 100, 90], [1]),
        (16, 9, [24, 24], [0, 1]),  # the weights fit one, a search with them does not
        (999, None, [100] * 4, [0, 1, 2, 3]),
    ],
)
def test_auto_takes_the_emptiest_devices_as_few_as_suffice(weights, beside, free, chosen):
    assert emptiest(free, weights, beside) == chosen


def test_a_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda:0, cuda:1") == [torch.device("cuda:0"), torch.device("cuda:1")]
    for device in ("cuda:2", "cuda:0,cuda:2"):
        with refused("cuda:2", "2 CUDA devices"):
            devices_of(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with refused("cuda", "0 CUDA devices"):
        devices_of("cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu,", "cuda:-1", "cuda:256"])
def test_a_name_that_is_not_a_device_is_refused(device):
    with refused("device"):
        devices_of(device)


@pytest.mark.parametrize("device", ["meta", "xpu", "mps", "cpu,cuda:0", "cpu,cpu", "cuda:0,cuda:0", "cuda,cuda:1"])
def test_a_device_that_no_recipe_can_name_is_refused(device, eight_gpus):
    with refused(f"device: {device!r} "):
        devices_of(device)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("layers", "count"), [(32, 2), (7, 3), (4, 4), (2, 3), (1, 1)])
def test_layers_are_spread_evenly_and_in_order(layers, count, tied):
    devices = [torch.device("cuda", index) for index in range(count)]
    places = device_map(LLAMA, layers, tied, devices)
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


def test_device_map_covers_every_parameter_once():
    """accelerate refuses to load a parameter without a device."""
    model = tiny_model("llama-mha")
    places = device_map(LLAMA, 4, False, [torch.device("cpu")])
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{module}.") for module in places) == 1, name
