"""Pruned models in vLLM: its own Llama, whose layers each have their own sizes, and lack the blocks that were removed.

Tested with vLLM 0.32. Only vLLM imports this module: see vllm_plugin.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from pgprune_cli.serving.vllm_plugin import check_parallel


class NormedAttention(LlamaAttention):
    """Qwen3's attention: queries and keys are normed head by head before they are rotated."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        super().__init__(config=config, **arguments)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the output `(N, hidden)` for positions `(N,)` and hidden_states `(N, hidden)`, N tokens in all."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.view(-1, self.num_heads, self.head_dim)).view(q.shape)
        k = self.k_norm(k.view(-1, self.num_kv_heads, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        output: Tensor = self.o_proj(self.attn(q, k, v))[0]
        return output


class PrunedDecoderLayer(nn.Module):
    """A layer with the sizes in `per_layer_config`. A skipped block does not exist, and neither does its norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.of_layers()[extract_layer_index(prefix)]
        # A Llama's config has attention_bias. A Qwen2 always has biases on q, k and v, and no others.
        bias = getattr(config, "attention_bias", config.model_type == "pruned_qwen2")
        output_biases = getattr(config, "output_biases", None) or ()
        self.self_attn = self.mlp = None
        if "attention" not in config.skip:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            attention = NormedAttention if config.model_type == "pruned_qwen3" else LlamaAttention
            self.self_attn = attention(
                config=config,
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                quant_config=vllm_config.quant_config,
                bias=bias,
                bias_o_proj=getattr(config, "attention_bias", False) or "attention" in output_biases,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.self_attn",
            )
        if "mlp" not in config.skip:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
            if "mlp" in output_biases:
                self.mlp.down_proj = RowParallelLinear(
                    input_size=config.intermediate_size,
                    output_size=config.hidden_size,
                    bias=True,
                    quant_config=vllm_config.quant_config,
                    prefix=f"{prefix}.mlp.down_proj",
                )

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden_states `(N, hidden)` and residual, which are not added yet. residual is None at the start."""
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _normed(norm: RMSNorm, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if residual is None:
        return norm(hidden_states), hidden_states
    normed: tuple[Tensor, Tensor] = norm(hidden_states, residual)
    return normed


class PrunedForCausalLM(LlamaForCausalLM):
    """A pruned Llama, Mistral, Qwen2 or Qwen3."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_parallel(vllm_config.model_config.hf_config, get_tensor_model_parallel_world_size())
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=PrunedDecoderLayer)
