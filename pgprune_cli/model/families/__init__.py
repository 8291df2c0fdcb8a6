"""Model families: one adapter per architecture, and the table of those that can be pruned.

To add a family, write its adapter in a file here and add it to `FAMILIES`.
"""

from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import ModelFamily
from pgprune_cli.model.families.llama import LLAMA

FAMILIES: tuple[ModelFamily, ...] = (LLAMA,)


def family_of(model_type: str) -> ModelFamily:
    """Return the adapter for a transformers `model_type`. Raises UserError for one that is not supported."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if model_type.startswith("pruned_"):
        raise UserError("the model is already pruned. Prune the original model with another sparsity.")
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"model type {model_type!r} is not supported. pgprune prunes {supported}.")


def family_of_export(model_type: str) -> ModelFamily:
    """Return the adapter for a `model_type`, which may be that of an exported model with unequal layers."""
    return family_of(model_type.removeprefix("pruned_"))
