"""What vLLM calls at the start of each of its processes: the pruned architectures, registered, so that it needs no
`trust_remote_code`. The model itself is in vllm_model.py, which vLLM imports when it loads one."""

from __future__ import annotations

from typing import Any

MODEL = "pgprune_cli.serving.vllm_model:PrunedForCausalLM"


def register() -> None:
    """The entry point of the group `vllm.general_plugins`; may be called more than once."""
    from vllm import ModelRegistry

    from pgprune_cli.serving import modeling_pruned  # which registers the configs with transformers

    known = ModelRegistry.get_supported_archs()
    for causal in modeling_pruned.FAMILIES.values():
        if causal.__name__ not in known:
            ModelRegistry.register_model(causal.__name__, MODEL)


def check_parallel(config: Any, degree: int) -> None:
    """Raises ValueError where tensor parallelism of this degree cannot split every layer of the pruned `config`."""
    for index, layer in enumerate(config.of_layers()):
        sizes: list[str] = []
        if "attention" not in layer.skip:
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if heads % degree or (groups % degree and degree % groups):
                sizes.append(f"{groups} KV heads with {heads} query heads")
        if "mlp" not in layer.skip and layer.intermediate_size % degree:
            sizes.append(f"{layer.intermediate_size} FFN channels")
        if sizes:
            raise ValueError(
                f"tensor parallelism of {degree} cannot split layer {index}: it has {' and '.join(sizes)}. In every "
                f"layer KV heads must divide by the degree or divide it, and query heads and channels divide by it: "
                f"pgprune export with --pad-kv-heads {degree} --pad-ffn {degree}, or serve with another degree"
            )
