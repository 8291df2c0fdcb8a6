"""What a search or a recovery takes, computed from shapes.

`sizes.py` reads the shapes off a model without weights, the other files compute.
"""
