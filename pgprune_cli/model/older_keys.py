"""Config keys under the names of transformers 4 beside those of transformers 5.

transformers 4 overlooks `rope_parameters`, and would compute something else without a warning. transformers 5 reads the
older names too, and prefers `rope_scaling`, so that has to say all that `rope_parameters` says.
"""

from __future__ import annotations

from typing import Any

ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
"""The keys that `rope_keys` replaces."""
BY_KIND = ("gemma3_text", "olmo3")
"""Model types whose full and sliding attention have their own RoPE in transformers 4, too."""


def rope_keys(config: Any) -> dict[str, Any]:
    """Return what config.json says about RoPE, for transformers 5 and 4. config: loaded by transformers.

    If transformers 4 cannot express it, its `rope_theta` is null. Then it stops with an error.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    model_type = config.model_type.removeprefix("pruned_")
    keys = {"rope_parameters": parameters, "rope_theta": None, "rope_scaling": None}
    if "full_attention" not in parameters:
        return keys | _older(model_type, parameters)
    full, sliding = parameters["full_attention"], parameters.get("sliding_attention")
    if model_type not in BY_KIND or sliding is None or _kind(sliding) != "default":
        return keys
    if model_type == "gemma3_text":
        return keys | _older(model_type, full) | {"rope_local_base_freq": sliding["rope_theta"]}
    return keys | _older(model_type, full) if sliding["rope_theta"] == full["rope_theta"] else keys


def with_both_names(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json with the number of experts under its older name as well."""
    if keys["model_type"] != "qwen3_moe" or "num_local_experts" not in keys:
        return keys
    return keys | {"num_experts": keys["num_local_experts"]}


def _older(model_type: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of transformers 4 for one RoPE."""
    scaling = dict(parameters)
    keys: dict[str, Any] = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": None}
    if (share := scaling.pop("partial_rotary_factor", None)) is not None:
        keys["partial_rotary_factor"] = share
    if _kind(parameters) == "default":
        return keys
    if _kind(parameters) == "longrope":  # transformers 4 looks for this length beside the scaling
        keys["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        if model_type == "phi3":  # and accepts exactly three keys
            for key in ("original_max_position_embeddings", "rope_type"):
                scaling.pop(key, None)
            scaling["type"] = "longrope"
    return keys | {"rope_scaling": scaling}


def _kind(parameters: dict[str, Any]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))
