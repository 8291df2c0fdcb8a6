"""pgprune: structurally smaller language models by policy gradient, forward passes only."""

__version__ = "0.1.0"
