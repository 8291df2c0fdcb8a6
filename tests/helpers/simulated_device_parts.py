"""The checks that run on the simulated devices of tests/simulated_device/device.cpp.

    python simulated_device_parts.py LIBRARY

Print one JSON object per part: its name, and its traceback if it failed. This is a program of its own because a process
has to register the device before it imports pgprune.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from pgprune_cli.model import devices
from pgprune_cli.model.prunable import PrunableModel

SIMULATED = "simulated"
BOTH = "simulated:0,simulated:1"


def register(library: str) -> None:
    """Register the devices with PyTorch. Call this before importing pgprune."""
    torch.utils.rename_privateuse1_backend(SIMULATED)
    torch.ops.load_library(library)
    module = types.ModuleType(f"torch.{SIMULATED}")
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch._register_device_module(SIMULATED, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    # On an out-of-tree device, tensors created in inference mode cannot replace parameters.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Make the devices refuse whatever makes the host wait for them."""
    torch.ops.simulated_device.set_strict(True)
    try:
        yield
    finally:
        torch.ops.simulated_device.set_strict(False)


def assert_fails(run: Callable[[], object], fact: str) -> None:
    """Fail unless `run` raises a RuntimeError whose message contains `fact`."""
    try:
        run()
    except RuntimeError as error:
        assert fact in str(error), error
        return
    raise AssertionError(f"no error about {fact!r}")


def refusals() -> None:
    """The simulated devices compute, and refuse what a GPU refuses."""
    tensor = torch.arange(6.0).view(2, 3).to(SIMULATED)
    assert tensor.device.type == SIMULATED and (tensor + 1.0).cpu().tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert_fails(lambda: tensor @ torch.ones(3, 2), "tensors on simulated:0 and on cpu")
    assert_fails(lambda: tensor[torch.tensor([0, 1])], "tensors on simulated:0 and on cpu")
    assert_fails(lambda: tensor @ tensor.to("simulated:1").T, "tensors on simulated:0 and on simulated:1")
    assert float(tensor.sum()) == 15.0
    assert tensor.long().cumsum(0).cpu().tolist() == [[0, 1, 2], [3, 5, 7]]
    for unordered in (
        lambda: tensor.cumsum(0),
        lambda: tensor.index_add_(0, torch.tensor([0]).to(SIMULATED), tensor[:1].clone()),
    ):
        assert_fails(unordered, "other sums every time")
    with waiting_is_an_error():
        for read in (lambda: float(tensor.sum()), tensor.cpu, tensor.nonzero, lambda: bool(tensor.any())):
            assert_fails(read, "the host waits")


def forward_passes() -> None:
    """Every architecture and weight format, repaired or not, gives the host's losses without making the host wait."""
    from helpers.masks import MODEL_MASKS, random_repair, random_tokens
    from helpers.models import ARCHITECTURES, tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.model.prunable import PrunableModel
    from pgprune_cli.model.quantized import quantize_projections

    tokens = random_tokens()
    for architecture in ARCHITECTURES:
        if architecture == "qwen3_5_text":  # the simulated device has no convolutions
            continue
        for weight_format in ("full", "int8", "fp8"):
            model = tiny_model(architecture)
            model_mask = MODEL_MASKS["an empty layer"](model)
            repaired = random_repair(model, model_mask, bias=True)
            if weight_format != "full":
                quantize_projections(model, weight_format)
            host = Evaluator(PrunableModel.of(model))
            simulated = Evaluator(PrunableModel.of(copy.deepcopy(model).to(SIMULATED)))
            for own in ({}, repaired):
                with waiting_is_an_error():
                    actual = simulated._summed(model_mask, tokens.to(SIMULATED), own)
                expected = host._summed(model_mask, tokens, own)
                torch.testing.assert_close(
                    actual.cpu(), expected, rtol=1e-4, atol=0
                )  # norms behind blocks magnify rounding


def solvers_without_memory() -> None:
    """Equations that the device has no memory for are solved on the host, with the host's result, in its place."""
    from pgprune_cli.forward.moments import Moments
    from pgprune_cli.repair.equations import repaired_output, solve_prefixes
    from pgprune_cli.scores.obs import removal_order

    factorise = torch.linalg.cholesky_ex

    def fails_on_device(matrix: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if matrix.device.type == SIMULATED:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return factorise(matrix, **options)

    torch.manual_seed(0)
    weight, inputs, columns = torch.randn(5, 8), torch.randn(40, 8), torch.tensor([0, 2, 3, 6])
    on_host = weight, inputs.T @ inputs, inputs.mean(0), torch.ones(()), columns, torch.arange(8), torch.eye(5)
    results = []
    for weight, second, first, one, columns, every, root in (on_host, [tensor.to(SIMULATED) for tensor in on_host]):
        moments = Moments(second, first, one)
        order, errors = removal_order(weight, second, 8)
        own = repaired_output(weight, first[:5], moments, columns, 0.01, with_bias=True)
        widths, weights = solve_prefixes(weight, second, every, [0, 4, 8], root, 0.01, solve=True)
        assert own.weight.device == own.bias.device == weight.device
        results.append([order, errors, own.weight.cpu(), own.bias.cpu(), widths, weights[4]])
        torch.linalg.cholesky_ex = fails_on_device
    torch.linalg.cholesky_ex = factorise
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def scores() -> None:
    """Every metric gives the host's scores."""
    from helpers.masks import random_tokens
    from helpers.models import tiny_model
    from pgprune_cli.scores.metrics import NEEDS, score

    text = [random_tokens(seed, rows=4, length=16) for seed in (0, 1)]
    model = tiny_model("llama-gqa")
    simulated = PrunableModel.of(copy.deepcopy(model).to(SIMULATED))
    for metric in (*NEEDS, "magnitude"):
        actual, expected = score(simulated, metric, text, 0), score(PrunableModel.of(model), metric, text, 0)
        for key, values in expected.items():
            torch.testing.assert_close(actual[key].cpu(), values, rtol=1e-5, atol=1e-8)


def compare_searches(*overrides: str, device: str = SIMULATED) -> None:
    """A search on the device is as good as one on the host.

    Attention differs, so it is not bit-identical, and in bfloat16 the best decision may be another one.
    """
    from helpers.recipes import SMALL
    from pgprune_cli.jobs.search import search
    from pgprune_cli.recipe.reader import find, load

    recipe = load(find("demo"), [*SMALL, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        host, simulated = (search(replace(recipe, device=place), Path(folder, place)) for place in ("cpu", device))
    assert abs(simulated.heldout_loss / host.heldout_loss - 1) < 0.04, (simulated.heldout_loss, host.heldout_loss)
    assert abs(simulated.sparsity - host.sparsity) < 0.01, (simulated.sparsity, host.sparsity)


def states_on_devices() -> None:
    """Hidden states that stay on the devices, which may be two, give the repair that those on the host give."""
    from helpers.masks import keep_first, random_tokens
    from helpers.models import tiny_model
    from pgprune_cli.forward import states
    from pgprune_cli.forward.layerwise import LayerwiseRun
    from pgprune_cli.model.loading import load_model
    from pgprune_cli.model.source import resolve
    from pgprune_cli.repair.least_squares import repair

    text = [random_tokens(seed, rows=4, length=16) for seed in (0, 1)]
    mask = keep_first(tiny_model("llama-mha"), [(2, 9)] * 4)
    unknown, move = states.free_for_states, LayerwiseRun.to_host
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama-mha").save_pretrained(folder)
        for device in (SIMULATED, BOTH):
            model = PrunableModel.of(load_model(resolve(folder), "float32", device))
            repaired = []
            fitted = 3 if device == SIMULATED else 2  # those of one device: autograd needs events between two
            for free in (None, 10**12):
                states.free_for_states = lambda _, free=free: free
                LayerwiseRun.to_host = None  # they do not move
                blocks = repair(model, mask, text, "sublayer", 1e-2, epochs=1, last_layers=fitted).blocks
                last = len(model.layers) - 1
                assert all(block.weight.device.type == "cpu" for (index, _), block in blocks.items() if index < last)
                repaired.append([block.weight.cpu() for block in blocks.values()])
            states.free_for_states, LayerwiseRun.to_host = unknown, move
            assert all(map(torch.equal, *repaired)), device


def evaluation() -> None:
    """The perplexity of a run is that on the host, for a model that is shrunk on the device, which may be two."""
    from helpers.recipes import SMALL
    from pgprune_cli.jobs.perplexity import perplexity
    from pgprune_cli.jobs.search import search
    from pgprune_cli.jobs.targets import open_target
    from pgprune_cli.recipe.reader import find, load

    tokens = torch.randint(200, (300,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        search(load(find("demo"), [*SMALL, "dtype=float32", "repair.method=least-squares-bias"]), run)
        expected, predicted = perplexity(open_target(str(run), device="cpu").module, tokens, 32)
        for device in (SIMULATED, BOTH):
            actual, count = perplexity(open_target(str(run), device=device).module, tokens, 32)
            assert count == predicted and abs(actual / expected - 1) < 1e-4, (device, actual, expected)


def untied_on_two() -> None:
    """A model with an untied head has the host's losses when it is spread over two devices."""
    from helpers.masks import MODEL_MASKS, random_repair, random_tokens
    from helpers.models import tiny_model
    from pgprune_cli.forward.divergence import Divergence
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.model.loading import load_model
    from pgprune_cli.model.source import resolve

    model_mask, tokens = MODEL_MASKS["random"](tiny_model("llama-mha")), random_tokens()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama-mha").save_pretrained(folder)
        host, simulated = (
            Evaluator(PrunableModel.of(load_model(resolve(folder), "float32", device))) for device in ("cpu", BOTH)
        )
        assert {str(parameter.device) for parameter in simulated.model.module.parameters()} == set(BOTH.split(","))
        repaired = random_repair(host.model.module, model_mask, bias=True)
        actual, expected = (evaluator.losses([model_mask], tokens, [repaired]) for evaluator in (simulated, host))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
        on_both = (Divergence(evaluator, 1.0) for evaluator in (simulated, host))
        actual, expected = (
            own.values([model_mask], tokens, [repaired], own.dense_states(tokens).to("cpu")) for own in on_both
        )
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def uploads_on_two() -> None:
    """Repaired weights that are uploaded to two devices, some of them in advance, give the host's losses."""
    from helpers.lanes import PlainLane
    from helpers.masks import MODEL_MASKS, random_repair, random_tokens
    from helpers.models import tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.forward.uploads import Uploads
    from pgprune_cli.model.loading import load_model
    from pgprune_cli.model.source import resolve

    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama-mha").save_pretrained(folder)
        host, simulated = (
            Evaluator(PrunableModel.of(load_model(resolve(folder), "float32", device))) for device in ("cpu", BOTH)
        )
        model_mask, tokens = MODEL_MASKS["random"](host.model.module), random_tokens()
        repaired = random_repair(host.model.module, model_mask, bias=True)
        weights = {key: [block.weight] for key, block in repaired.items()}
        layers = simulated.model.layers
        devices = {key: next(layers[key[0]].parameters()).device for key in weights}
        for room in (0, 5000):
            uploads = Uploads(weights, devices, dict.fromkeys(devices.values(), room), PlainLane)
            with simulated.uploading(uploads):
                actual = simulated.losses([model_mask], tokens, [repaired])
            torch.testing.assert_close(actual, host.losses([model_mask], tokens, [repaired]), rtol=1e-5, atol=0)


def stored_head_on_two() -> None:
    """A head that is stored beside tied embeddings is tied only if it equals them, also on two devices."""
    from safetensors.torch import load_file, save_file

    from helpers.masks import dense_mask, random_tokens
    from helpers.models import tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.model.loading import load_model
    from pgprune_cli.model.source import resolve

    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama-gqa").save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        tensors = load_file(file)
        for stored in (tensors["model.embed_tokens.weight"].clone(), torch.randn(96, 32)):
            save_file(tensors | {"lm_head.weight": stored}, file, metadata={"format": "pt"})
            host, simulated = (load_model(resolve(folder), "float32", device, "int8") for device in ("cpu", BOTH))
            head, embedding = simulated.get_output_embeddings().weight, simulated.get_input_embeddings().weight
            assert (head is embedding) == torch.equal(stored, tensors["model.embed_tokens.weight"])
            actual, expected = (
                Evaluator(PrunableModel.of(model)).losses([dense_mask(model)], random_tokens())
                for model in (simulated, host)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def latencies() -> None:
    """Latencies can be measured on the device, and those of elements are positive."""
    from helpers.models import tiny_model
    from pgprune_cli.search.costs import measure_latency

    costs = measure_latency(PrunableModel.of(tiny_model("llama-gqa").to(SIMULATED)), 8)
    assert min(cost.element for by_layer in costs.values() for cost in by_layer) > 0


WIDTHS = ("search.policy=widths", "search.masks_per_step=4", "search.forward_passes=12", "repair.windows=8")
WIDTHS += ("calibration.windows=24", "dtype=float32")
REPAIRED = "repair.method=least-squares"
PARTS: dict[str, Callable[[], None]] = {
    "refusals": refusals,
    "forward passes": forward_passes,
    "scores": scores,
    "unit search": lambda: compare_searches("dtype=float32"),
    "unit search with bias repair": lambda: compare_searches("dtype=float32", "repair.method=bias"),
    "unit search over whole layers": lambda: compare_searches("dtype=float32", "units.families=[layer]"),
    "width search": lambda: compare_searches(*WIDTHS, REPAIRED),
    "width search in bfloat16": lambda: compare_searches(*WIDTHS, REPAIRED, "dtype=bfloat16"),
    "width search on int8 weights": lambda: compare_searches(*WIDTHS, REPAIRED, "weight_format=int8"),
    "width search on fp8 weights": lambda: compare_searches(*WIDTHS, f"{REPAIRED}-bias", "weight_format=fp8"),
    "unit search on two devices": lambda: compare_searches("dtype=float32", device=BOTH),
    "width search on two devices": lambda: compare_searches(*WIDTHS, REPAIRED, "weight_format=int8", device=BOTH),
    "untied head on two devices": untied_on_two,
    "uploads on two devices": uploads_on_two,
    "stored head on two devices": stored_head_on_two,
    "hidden states on devices": states_on_devices,
    "evaluation of a run": evaluation,
    "latencies": latencies,
    "solvers without memory": solvers_without_memory,
}


def main() -> None:
    warnings.simplefilter("ignore")  # PyTorch warns about out-of-tree backends
    register(sys.argv[1])
    devices.GPU = SIMULATED
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name, part in PARTS.items():
        try:
            part()
            fault = ""
        except Exception:
            fault = traceback.format_exc()
        print(json.dumps({"part": name, "fault": fault}), flush=True)


if __name__ == "__main__":
    main()
