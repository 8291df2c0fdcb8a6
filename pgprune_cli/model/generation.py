"""Makes a generation config one that transformers 5 saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pgprune_cli.console.hub_logging import quiet_transformers
from pgprune_cli.errors import UserError
from pgprune_cli.storage.records import read_json, write_json

FILE = "generation_config.json"


def allow_sampling(generation: Any) -> bool:
    """Set `do_sample` if the config says how to sample and not that it does. Return True if that was needed.

    transformers 5 loads such a config (Llama 2's and Vicuna's are of this kind), but refuses to save a model with it.
    """
    if generation.do_sample or _is_valid(generation):
        return False
    generation.do_sample = True
    return _is_valid(generation)


def repair_generation_config(directory: Path) -> None:
    """Make the generation_config.json in a directory one that can be saved again, if it is not."""
    from transformers import GenerationConfig

    try:
        keys = read_json(directory / FILE)
        with quiet_transformers():
            generation = GenerationConfig(**keys)
    except (UserError, TypeError, ValueError):  # absent, or not a generation config
        return
    if allow_sampling(generation):
        write_json(directory / FILE, keys | {"do_sample": True})


def _is_valid(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True
