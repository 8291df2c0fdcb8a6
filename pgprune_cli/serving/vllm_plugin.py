"""The vLLM plugin: registers the pruned architectures, so that vLLM needs no `trust_remote_code`.

vLLM calls `register` at the start of each of its processes. It imports the model class, in vllm_model.py, only when it
loads a pruned model.
"""

from __future__ import annotations

from typing import Any

MODEL = "pgprune_cli.serving.vllm_model:PrunedForCausalLM"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The model types of the dense models that vllm_model.py computes."""


def register() -> None:
    """Register the pruned models with vLLM: the entry point of `vllm.general_plugins`. May be called repeatedly."""
    from vllm import ModelRegistry

    from pgprune_cli.serving import modeling_pruned  # registers the configs with transformers

    registered = ModelRegistry.get_supported_archs()
    for model_type in FAMILIES:
        name = modeling_pruned.FAMILIES[model_type].__name__
        if name not in registered:
            ModelRegistry.register_model(name, MODEL)


def check_parallel(config: Any, degree: int) -> None:
    """Raise ValueError if tensor parallelism of this degree cannot split every layer of a pruned model."""
    for index, layer in enumerate(config.of_layers()):
        sizes: list[str] = []
        if "attention" not in layer.skip:
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if heads % degree or (kv_heads % degree and degree % kv_heads):
                sizes.append(f"{kv_heads} KV heads with {heads} query heads")
        if "mlp" not in layer.skip and layer.intermediate_size % degree:
            sizes.append(f"{layer.intermediate_size} FFN channels")
        if sizes:
            raise ValueError(
                f"tensor parallelism of {degree}: cannot split layer {index}, which has {' and '.join(sizes)}. Query "
                f"heads and channels must be multiples of the degree, and KV heads a multiple or a divisor of it. Run "
                f"pgprune export with --pad-kv-heads {degree} --pad-ffn {degree}, or serve with another degree."
            )
