"""Write the pruned model: a plan, the surgery on the weights, and one module per format."""
