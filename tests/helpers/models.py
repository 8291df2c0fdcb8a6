"""Tiny models of every supported family, built without network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

ARCHITECTURES = (
    "llama-mha",
    "llama-gqa",
    "llama-biased",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "ministral3",
    "seed_oss",
    "olmo2",
    "olmo3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "qwen3_5_text",
)
"""The families that pgprune prunes. Every test of the families runs over them."""

EXPERT_ARCHITECTURES = ("mixtral", "qwen3_moe", "gpt_oss")
"""Mixtures of experts. Tests that look at linear layers do not run over them."""

VOCABULARY = 96


def tiny_config(architecture: str):
    """Return a transformers config of 4 layers with 24 channels and 4 KV heads of 2 query heads (1 in `llama-mha`).

    `llama-gqa`, `qwen3` and the Gemmas tie their embeddings; `llama-biased` has biases everywhere, `qwen2` and
    `seed_oss` on q, k and v. Mixtures of experts have 8 experts of 12 channels, of which every token uses 2.
    """
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    match architecture:
        case "llama-mha":
            return LlamaConfig(**sizes | {"num_attention_heads": 4})
        case "llama-gqa":
            return LlamaConfig(**sizes | {"tie_word_embeddings": True})
        case "llama-biased":
            return LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
        case "mistral":
            return MistralConfig(**sizes, sliding_window=16)
        case "qwen2":
            return Qwen2Config(**sizes)
        case "qwen3":
            return Qwen3Config(**sizes | {"tie_word_embeddings": True})
    return _new_config(architecture, sizes)


SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


def _new_config(architecture: str, sizes: dict):
    """Return the config of a family that is not a Llama. sizes: what the families have in common."""
    import transformers as tf

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
    tied = sizes | {"tie_word_embeddings": True}
    experts = sizes | {"num_experts_per_tok": 2}
    match architecture:
        case "smollm3":  # its last layer has no rotary embeddings
            return tf.SmolLM3Config(**tied)
        case "granite":
            multipliers = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
            return tf.GraniteConfig(**sizes, **multipliers, attention_multiplier=0.3)
        case "ministral3":
            scaling = {
                "max_position_embeddings": 128,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
            return tf.Ministral3Config(**sizes, rope_parameters=yarn | scaling | {"mscale": 1.0, "mscale_all_dim": 1.0})
        case "seed_oss":
            return tf.SeedOssConfig(**sizes)
        case "phi3":
            rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            return tf.Phi3Config(**sizes, rope_parameters=rope, sliding_window=16)
        case "gemma":
            return tf.GemmaConfig(**tied)
        case "gemma2":  # its layers alternate between sliding and full attention
            return tf.Gemma2Config(**tied, query_pre_attn_scalar=8, sliding_window=16)
        case "gemma3_text":
            full = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
            rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
            options = {"query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": SLIDING}
            return tf.Gemma3TextConfig(**tied, **options, rope_parameters=rope)
        case "olmo2":
            return tf.Olmo2Config(**sizes)
        case "olmo3":
            return tf.Olmo3Config(**sizes, sliding_window=16, layer_types=SLIDING)
        case "mixtral":
            return tf.MixtralConfig(**experts | {"intermediate_size": 12}, num_local_experts=8)
        case "qwen3_moe":
            return tf.Qwen3MoeConfig(**experts, num_experts=8, moe_intermediate_size=12, norm_topk_prob=True)
        case "gpt_oss":  # its layers alternate between sliding and full attention
            options = {"num_local_experts": 8, "sliding_window": 16, "rope_parameters": yarn | {"truncate": False}}
            return tf.GptOssConfig(**experts | {"intermediate_size": 12}, **options)
        case "qwen3_5_text":  # every key head has two value heads
            heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
            layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
            rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            rope |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
            options = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": layers}
            return tf.Qwen3_5TextConfig(**sizes, **heads, **options, rope_parameters=rope)
    raise ValueError(architecture)


def tiny_model(architecture: str, seed: int = 0) -> nn.Module:
    """Return a random float32 model in eval mode, with weights so large that every unit matters."""
    from transformers import AutoModelForCausalLM

    from pgprune_cli.model.loading import eager_if_capped

    torch.manual_seed(seed)
    config = tiny_config(architecture)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager_if_capped(config))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if parameter.mean() > 0.5 else 0.0, std=0.2)
    return model.eval().requires_grad_(False)


TEXT = "Don't stop: 12345 foxes' dens, they'RE 3 métres   deep!\n\n\tThe  end… of 2024-11-25 (日本語) <s> again. "


def save_tokenizer(directory: Path, size: int = VOCABULARY, splitter=None, **options) -> None:
    """Save a byte-level BPE tokenizer of `size` tokens, three of them special. A small one lacks most bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<s>", "</s>"]  # transformers adds the first one to every Qwen2
    vocabulary = [*special, *letters[: size - 4], "ab"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, [("a", "b")]))
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if size > len(special + letters):
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator([TEXT] * 4, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | options)
    fast.save_pretrained(directory)


def save_shards(directory: Path) -> Path:
    """Split the weights of a saved model into two files with an index that names the second one first."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"two.safetensors": names[: len(names) // 2], "one.safetensors": names[len(names) // 2 :]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
