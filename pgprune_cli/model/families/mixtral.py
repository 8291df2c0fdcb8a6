"""Mixtral and Qwen3's mixtures of experts: files hold every matrix of every expert on its own."""

from pgprune_cli.model.families.adapter import GgufArchitectures
from pgprune_cli.model.families.experts import ExpertsFamily

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"

MIXTRAL = ExpertsFamily(
    model_types=("mixtral",),
    expert_sizes=("num_local_experts", "intermediate_size"),
    files={"w1": (GATE_UP, 0), "w3": (GATE_UP, 1), "w2": (DOWN, 0)},
    renamed="block_sparse_moe",
    gguf={"mixtral": GgufArchitectures(None, None)},
)
QWEN3_MOE = ExpertsFamily(
    model_types=("qwen3_moe",),
    expert_sizes=("num_experts", "moe_intermediate_size"),
    files={"gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1), "down_proj": (DOWN, 0)},
    gguf={"qwen3_moe": GgufArchitectures(None, None)},
)
