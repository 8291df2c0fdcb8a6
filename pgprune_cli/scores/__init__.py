"""Metrics: pure functions from the statistics of a block to a score per element."""
