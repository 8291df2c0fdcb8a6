"""What a search takes, from shapes: `sizes.py` reads them off a model without weights, the others do arithmetic."""
