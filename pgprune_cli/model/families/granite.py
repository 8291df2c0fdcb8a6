"""Granite: a Llama that multiplies embeddings, attention scores and the output of every block, and divides its logits.

Every block's output is multiplied by the same number, so repairs and comparisons of blocks need not know it.
"""

from typing import Any

from torch import Tensor

from pgprune_cli.model.families.adapter import GgufArchitectures
from pgprune_cli.model.families.llama import LlamaFamily


class GraniteFamily(LlamaFamily):
    """The adapter of Granite."""

    def finish_logits(self, config: Any, logits: Tensor) -> Tensor:
        return logits.div_(config.logits_scaling)


GRANITE = GraniteFamily(model_types=("granite",), gguf={"granite": GgufArchitectures("granite", "deci")})
