"""What runs on the simulated device of device.cpp, part by part. `python parts.py LIBRARY` prints a JSON object a line.

A program of its own: a process has one such device, from its first import on.
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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pgprune_cli.model.prunable import PrunableModel

CHIP = "chip"
TWO = "chip:0,chip:1"


def register(library: str) -> None:
    """Makes the device known to PyTorch. Before anything of pgprune is imported."""
    torch.utils.rename_privateuse1_backend(CHIP)
    torch.ops.load_library(library)
    module = types.ModuleType(f"torch.{CHIP}")
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch._register_device_module(CHIP, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    # Tensors made in inference mode cannot stand in for parameters on a device that PyTorch does not ship.
    torch.inference_mode = torch.no_grad


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.ops.made_up_chip.strict(True)
    try:
        yield
    finally:
        torch.ops.made_up_chip.strict(False)


def fails(run: Callable[[], object], word: str) -> None:
    try:
        run()
    except RuntimeError as error:
        assert word in str(error), error
        return
    raise AssertionError(f"nothing was said of {word!r}")


def what_is_refused() -> None:
    ours = torch.arange(6.0).view(2, 3).to(CHIP)
    assert ours.device.type == CHIP and (ours + 1.0).cpu().tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    fails(lambda: ours @ torch.ones(3, 2), "tensors on chip:0 and on cpu")
    fails(lambda: ours[torch.tensor([0, 1])], "tensors on chip:0 and on cpu")
    fails(lambda: ours @ ours.to("chip:1").T, "tensors on chip:0 and on chip:1")
    assert float(ours.sum()) == 15.0
    with waiting_is_an_error():
        for read in (lambda: float(ours.sum()), ours.cpu, ours.nonzero, lambda: bool(ours.any())):
            fails(read, "the host waits")


def forward_passes() -> None:
    """Of every layout and kind of weights, repaired or not: the losses of the host, and none is waited for."""
    from helpers.masks import MODEL_MASKS, some_outputs, some_tokens
    from helpers.models import ARCHITECTURES, tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.model.prunable import PrunableModel
    from pgprune_cli.model.quantized import quantize_projections

    keep, tokens = MODEL_MASKS["an empty layer"], some_tokens()
    for architecture in ARCHITECTURES:
        for weights in ("dtype", "int8", "fp8"):
            model = tiny_model(architecture)
            outputs = some_outputs(model, keep, bias=True)
            if weights != "dtype":
                quantize_projections(model, weights)
            host, chip = Evaluator(PrunableModel.of(model)), Evaluator(copy.deepcopy(model).to(CHIP))
            for given in ({}, outputs):
                with waiting_is_an_error():
                    found = chip._summed(keep, tokens.to(CHIP), given)
                expected = host._summed(keep, tokens, given)
                torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0)


def scores() -> None:
    from helpers.masks import some_tokens
    from helpers.models import tiny_model
    from pgprune_cli.scores.metrics import NEEDS, score

    text = [some_tokens(seed, rows=4, length=16) for seed in (0, 1)]
    model = tiny_model("llama-gqa")
    there = copy.deepcopy(model).to(CHIP)
    for metric in (*NEEDS, "magnitude"):
        found, expected = score(there, metric, text, 0), score(PrunableModel.of(model), metric, text, 0)
        for key, values in expected.items():
            torch.testing.assert_close(found[key].cpu(), values, rtol=1e-5, atol=1e-8)


def searched(*overrides: str, device: str = CHIP) -> None:
    """A decision as good as the host's. (Its bits are others: attention is computed in another way.)"""
    from helpers.recipes import SMALL
    from pgprune_cli.jobs.search import search
    from pgprune_cli.recipe.reader import find, load

    recipe = load(find("demo"), [*SMALL, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        here, there = (search(replace(recipe, device=where), Path(folder, where)) for where in ("cpu", device))
    assert abs(there.heldout_loss / here.heldout_loss - 1) < 0.02, (there.heldout_loss, here.heldout_loss)
    assert abs(there.sparsity - here.sparsity) < 0.01, (there.sparsity, here.sparsity)


def untied_on_two() -> None:
    from helpers.masks import MODEL_MASKS, some_outputs, some_tokens
    from helpers.models import tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.model.loading import load_model
    from pgprune_cli.model.source import resolve

    keep, tokens = MODEL_MASKS["random"], some_tokens()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama-mha").save_pretrained(folder)
        here, there = (Evaluator(load_model(resolve(folder), "float32", device)) for device in ("cpu", TWO))
        assert {str(parameter.device) for parameter in there.model.parameters()} == set(TWO.split(","))
        outputs = some_outputs(here.model, keep, bias=True)
        found, expected = (evaluator.losses([keep], tokens, [outputs]) for evaluator in (there, here))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def a_stored_head_on_two() -> None:
    """The files of a model with tied embeddings may hold its head, too."""
    from safetensors.torch import load_file, save_file

    from helpers.masks import MODEL_MASKS, some_tokens
    from helpers.models import tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.model.loading import HEAD, load_model
    from pgprune_cli.model.source import resolve

    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama-gqa").save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        tensors = load_file(file)
        for stored in (tensors["model.embed_tokens.weight"].clone(), torch.randn(96, 32)):
            save_file(tensors | {HEAD: stored}, file, metadata={"format": "pt"})
            here, there = (load_model(resolve(folder), "float32", device, "int8") for device in ("cpu", TWO))
            head, embedding = there.get_output_embeddings().weight, there.get_input_embeddings().weight
            assert (head is embedding) == torch.equal(stored, tensors["model.embed_tokens.weight"])
            found, expected = (
                Evaluator(PrunableModel.of(model)).losses([MODEL_MASKS["dense"]], some_tokens())
                for model in (there, here)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def latencies() -> None:
    from helpers.models import tiny_model
    from pgprune_cli.forward.masked import Evaluator
    from pgprune_cli.search.costs import measure_latency

    costs = measure_latency(Evaluator(tiny_model("llama-gqa").to(CHIP)), 8)
    assert min(*costs.attention, *costs.ffn) > 0


LAYERS = ("search.policy=widths", "search.masks_per_step=4", "search.forward_passes=12", "repair.windows=8")
LAYERS += ("calibration.windows=24", "dtype=float32")
REPAIRED = "repair.method=least-squares"
PARTS: dict[str, Callable[[], None]] = {
    "what is refused": what_is_refused,
    "forward_passes": forward_passes,
    "scores": scores,
    "a search over units": lambda: searched("dtype=float32"),
    "a search over units, repaired by biases": lambda: searched("dtype=float32", "repair.method=bias"),
    "a search over layers": lambda: searched("dtype=float32", "units.families=[layer]"),
    "a search over widths": lambda: searched(*LAYERS, REPAIRED),
    "a search over widths in bfloat16": lambda: searched(*LAYERS, REPAIRED, "dtype=bfloat16"),
    "a search over widths from int8": lambda: searched(*LAYERS, REPAIRED, "weight_format=int8"),
    "a search over widths from fp8": lambda: searched(*LAYERS, f"{REPAIRED}-bias", "weight_format=fp8"),
    "a search over units on two": lambda: searched("dtype=float32", device=TWO),
    "a search over widths on two": lambda: searched(*LAYERS, REPAIRED, "weight_format=int8", device=TWO),
    "untied on two": untied_on_two,
    "a stored head on two": a_stored_head_on_two,
    "latencies": latencies,
}


def main() -> None:
    warnings.simplefilter("ignore")  # of a backend that PyTorch does not ship
    register(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name, part in PARTS.items():
        try:
            part()
            said = ""
        except Exception:
            said = traceback.format_exc()
        print(json.dumps({"part": name, "said": said}), flush=True)


if __name__ == "__main__":
    main()
