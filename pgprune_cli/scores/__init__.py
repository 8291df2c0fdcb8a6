"""Metrics: one pure function per file, from the statistics of a block to a score per unit."""
