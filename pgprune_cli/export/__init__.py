"""Writing the pruned model: the plan, the surgery, and one file per format."""
