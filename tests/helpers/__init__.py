"""What several tests share: tiny models and recipes, damaged inputs, references worked out by hand."""
