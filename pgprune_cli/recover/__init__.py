"""Training of a pruned model, to win back what pruning cost."""
