"""Everything that runs the model: forward passes under masks, layer by layer, and what is measured on the way."""
