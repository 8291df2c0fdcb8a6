"""What a search takes, computed from shapes: `sizes.py` reads them off a model without weights, the others compute."""
