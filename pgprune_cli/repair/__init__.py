"""Refitting the kept weights without a backward pass through the model."""
