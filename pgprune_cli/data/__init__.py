"""Calibration and evaluation text: where it comes from, how it is tokenized, and how it is cut into windows."""
