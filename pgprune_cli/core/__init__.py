"""The pure algorithm: no I/O, logging, devices, global randomness or models."""
