"""recipes new, search MODEL: a recipe for a model, with values that suit its size and this machine.

Only the model's config is read, or the header of a GGUF file, so this takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pgprune_cli.estimate.memory import memory
from pgprune_cli.estimate.sizes import Sizes
from pgprune_cli.jobs.memory import texts_of
from pgprune_cli.model.context import longest_context
from pgprune_cli.model.devices import devices_of, fastest_dtype
from pgprune_cli.model.families import can_be_rounded, refuse_units
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.loading import check_prunable, empty_model
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import load, shipped_folder
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.settings import Setting, size_settings, yaml_lines
from pgprune_cli.recipe.strict_yaml import one_line, to_yaml
from pgprune_cli.run.settled import absolute_text
from pgprune_cli.search.texts import empty_text

_SECTIONS = ("", "calibration", "units", "budget", "scores", "search", "repair", "recover", "evaluation")

BASE = "_base"
"""The shipped recipe that a new one extends."""


def new_recipe(
    model: str, *, sparsity: float = 0.3, calibration: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Recipe, str]:
    """Return a recipe that removes `sparsity` of a model's prunable parameters, and its text with comments.

    model: as in recipes (a hub name, a directory, a GGUF file or `demo`); calibration: a corpus name or a file, c4 by
    default; overrides: `KEY=VALUE`, as `--set` takes them. Raises UserError for a model that cannot be pruned.
    """
    check_prunable(resolve(model, weights=False))
    dtype = _dtype()
    empty = empty_model(model, dtype.value)
    settings = [
        Setting("model", model),
        dtype,
        *_text_settings(model, calibration),
        *_units(empty),
        Setting("budget.sparsity", sparsity, "fraction of the prunable parameters to remove"),
        *size_settings(
            _parameters(empty),
            len(empty.layers),
            longest_context(empty.config) or 2048,
            experts=_has_experts(empty),
        ),
    ]
    settings.sort(key=lambda setting: _SECTIONS.index(setting.key.rpartition(".")[0]))
    recipe = _load(settings, overrides)
    refuse_units(empty.config.model_type, recipe.units.families)
    if weight_format := _weight_format(recipe, empty):
        settings.insert(2, weight_format)
        recipe = _load(settings, overrides)
    return recipe, _text(settings, empty, sparsity)


def run_name(model: str, sparsity: float) -> str:
    """Return the name of the run directory of `search MODEL`: `SmolLM2-135M-30` for owner/SmolLM2-135M at 30 %."""
    path = Path(model)
    return f"{path.stem if path.suffix == '.gguf' else path.name}-{round(100 * sparsity):02}"


def _dtype() -> Setting:
    device, dtype = devices_of("auto")[0], fastest_dtype("auto")
    name = "CPU" if device.type == "cpu" else "GPU"
    if dtype == "float32":
        return Setting("dtype", dtype, f"this {name} has no bfloat16 instructions, float32 is faster")
    return Setting("dtype", dtype, "this CPU has bfloat16 instructions" if name == "CPU" else "")


def _text_settings(model: str, calibration: str | None) -> list[Setting]:
    if calibration is None and model == "demo":  # its language is its own
        return [Setting("calibration.corpus", "demo"), Setting("evaluation.corpora", ["demo"])]
    if calibration is None:
        return [Setting("calibration.corpus", "c4", "or a .txt, .jsonl, .json or .parquet file with text like yours")]
    corpus = absolute_text(calibration)
    return [Setting("calibration.corpus", corpus, "keep it apart from the text that you evaluate on")]


def _units(model: PrunableModel) -> list[Setting]:
    """Leave out the blocks whose units cannot be removed one by one."""
    refusals = {block.name: model.family.refusal(model.config.model_type, block.name) for block in model.family.blocks}
    kept = [name for name, reason in refusals.items() if not reason]
    reasons = [reason.rstrip(".") for reason in refusals.values() if reason]
    return [Setting("units.families", kept, reasons[0])] if reasons else []


def _weight_format(recipe: Recipe, model: PrunableModel) -> Setting | None:
    """Return int8 if the search needs more memory than is free, None if it fits or int8 cannot store the weights."""
    if not can_be_rounded(model.config.model_type):
        return None
    devices = devices_of("auto")
    free = _free_bytes(devices)
    needed = memory(Sizes(model, recipe), texts_of(recipe, empty_text(recipe))).device
    if needed <= free:
        return None
    comment = f"in full it would need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {devices[0].type}"
    return Setting("weight_format", "int8", comment)


def _free_bytes(devices: Sequence[torch.device]) -> int:
    if devices[0].type == "cuda":
        return sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    import psutil

    return int(psutil.virtual_memory().available)


def _load(settings: Sequence[Setting], overrides: Sequence[str]) -> Recipe:
    """Build the recipe through the reader, which checks every value."""
    own = [f"{setting.key}={to_yaml(setting.value)}" for setting in settings]
    return load(shipped_folder() / f"{BASE}.yaml", [*own, *overrides])


def _has_experts(model: PrunableModel) -> bool:
    return any(grid.separate for grids in model.shape.grids.values() for grid in grids)


def _parameters(model: PrunableModel) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


def _text(settings: Sequence[Setting], model: PrunableModel, sparsity: float) -> str:
    """Return the recipe as YAML: a comment that describes it, then the settings, section by section."""
    *units, last = [part for block in model.family.kinds for part in _counts(model, block)]
    lines = [
        f"# {one_line(settings[0].value)} with {sparsity:.0%} of its prunable parameters removed.",
        f"# {_parameters(model) / 1e6:,.1f} M parameters; {model.shape.layers} layers of {', '.join(units)} "
        f"and {last}.",
        "#     pgprune search THIS_FILE",
        f"extends: {BASE}  # every key that is not here keeps its value there: pgprune recipes show THIS_FILE",
    ]
    return "\n".join([*lines, *yaml_lines(settings)]) + "\n"


def _counts(model: PrunableModel, block: Block) -> list[str]:
    """Return how many groups, if they have a name, and elements a block has at most, in words."""
    layers = [index for index, blocks in enumerate(model.shape.blocks) if block in blocks.values()]
    grids = [model.shape.grids[block.name][layer] for layer in layers]
    counts = {
        block.group_name: max((grid.groups for grid in grids), default=0),
        block.element_name: max((grid.elements for grid in grids), default=0),
    }
    return [f"{count:,} {name}" for name, count in counts.items() if name]
