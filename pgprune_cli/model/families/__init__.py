"""Model families: one adapter per architecture, and the table of those that can be pruned.

To add a family, write its adapter in a file here and add it to `FAMILIES`.
"""

from collections.abc import Sequence

from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import ModelFamily, dense_type
from pgprune_cli.model.families.experts import ExpertsFamily
from pgprune_cli.model.families.gemma import GEMMA, GEMMA2
from pgprune_cli.model.families.gpt_oss import GPT_OSS
from pgprune_cli.model.families.granite import GRANITE
from pgprune_cli.model.families.llama import LLAMA
from pgprune_cli.model.families.mixtral import MIXTRAL, QWEN3_MOE
from pgprune_cli.model.families.olmo import OLMO
from pgprune_cli.model.families.phi3 import PHI3
from pgprune_cli.model.families.qwen3_5 import QWEN3_5
from pgprune_cli.model.families.smollm3 import SMOLLM3
from pgprune_cli.model.families.wrapper import WRAPPERS

FAMILIES: tuple[ModelFamily, ...] = (
    LLAMA,
    SMOLLM3,
    GRANITE,
    OLMO,
    GEMMA,
    GEMMA2,
    PHI3,
    QWEN3_5,
    MIXTRAL,
    QWEN3_MOE,
    GPT_OSS,
)


def family_of(model_type: str) -> ModelFamily:
    """Return the adapter for a transformers `model_type`, which may be that of an export with unequal layers.

    Raises UserError for one that is not supported.
    """
    if (family := find_family(model_type)) is not None:
        return family
    supported = ", ".join([*(name for family in FAMILIES for name in family.model_types), *WRAPPERS])
    raise UserError(f"model type {model_type!r} is not supported. pgprune prunes {supported}.")


def find_family(model_type: str) -> ModelFamily | None:
    """Return the adapter for a `model_type`, which may be that of an export with unequal layers, or None."""
    return next((family for family in FAMILIES if dense_type(model_type) in family.model_types), None)


def begins_with_bos(model_type: str) -> bool:
    """Return whether models of this type were trained on texts that begin with BOS. False for an unknown type.

    model_type: of a transformers config, also that of an exported model with unequal layers.
    """
    return any(dense_type(model_type) in family.bos_types for family in FAMILIES)


def model_type_of_gguf(architecture: str) -> str:
    """Return the transformers `model_type` for llama.cpp's name of an architecture.

    Several types can have one architecture. They then belong to one family, and the first is returned. A name that no
    family has is returned as it is, for the error message about it.
    """
    types = (kind for family in FAMILIES for kind, names in family.gguf.items() if names.equal == architecture)
    return next(types, architecture)


def refuse_units(model_type: str, families: Sequence[str]) -> None:
    """Raise UserError if units of these names cannot be removed one by one from a model of this type."""
    family = family_of(model_type)
    for name in families:
        if reason := family.refusal(model_type, name):
            others = [other for other in families if other != name] or [f"{name}-block"]
            raise UserError(f"units.families: {reason} Set units.families to [{', '.join(others)}].")


def can_be_rounded(model_type: str) -> bool:
    """Return whether the weights of this model type can be stored in one byte. Those of experts cannot."""
    return not isinstance(family_of(model_type), ExpertsFamily)


def refuse_for_experts(model_type: str, weight_format: str, metric: str, families: Sequence[str], repair: str) -> None:
    """Raise UserError for settings that a mixture of experts does not support: its experts are no linear layers."""
    if not isinstance(family_of(model_type), ExpertsFamily):
        return
    if weight_format != "full":
        raise UserError(
            f"weight_format: {weight_format} does not store the experts of {model_type}. Set weight_format to full."
        )
    if metric == "taylor":
        raise UserError(
            f"scores.metric: taylor has no gradients of the experts of {model_type}. Choose another one, such as obs."
        )
    if repair in ("bias", "least-squares-bias") and "ffn" in families:
        raise UserError(
            f"repair.method: {repair} would give the experts of {model_type} biases, which its class does not have. "
            "Set repair.method to least-squares or none."
        )
