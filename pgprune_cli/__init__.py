"""pgprune: structurally smaller language models by policy gradient, forward passes only."""

__version__ = "0.1.0"

from pgprune_cli.api import Pruned, evaluate, prune

__all__ = ["Pruned", "__version__", "evaluate", "prune"]
