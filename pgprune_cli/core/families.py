"""The families of units by name. Kept apart from `space.py` so that reading a recipe does not import torch."""

from collections.abc import Mapping

BLOCKS_OF: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "ffn": ("ffn",),
    "attention-block": ("attention",),
    "ffn-block": ("ffn",),
    "layer": ("attention", "ffn"),
}
"""The blocks of a layer that the units of a family cover."""

WHOLE_FAMILIES = ("attention-block", "ffn-block", "layer")
"""The families with one unit per layer: a block, or the layer, is kept or removed as a whole."""
