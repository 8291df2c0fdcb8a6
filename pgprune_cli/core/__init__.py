"""The algorithm, pure: no I/O, no logging, no device, no global randomness, no model."""
