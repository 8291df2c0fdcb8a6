"""SmolLM3: a Llama, some of whose layers have no rotary embeddings. Its config lists which ones."""

from pgprune_cli.model.families.adapter import GgufArchitectures
from pgprune_cli.model.families.llama import LlamaFamily

SMOLLM3 = LlamaFamily(
    model_types=("smollm3",),
    layer_lists=("layer_types", "no_rope_layers"),
    gguf={"smollm3": GgufArchitectures("smollm3", None)},
)
