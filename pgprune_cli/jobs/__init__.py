"""One file per verb: reads what it is given, wires the parts, owns the loop and the randomness."""
