"""From the name of a model to a `PrunableModel`: files, safety checks, devices, weight formats, families."""
