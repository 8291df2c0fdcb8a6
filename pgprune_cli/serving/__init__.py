"""Code that runs exported models in transformers, MLX and vLLM. It imports nothing else of pgprune."""
