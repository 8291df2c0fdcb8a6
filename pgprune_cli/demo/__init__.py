"""A tiny language model and the grammar that writes its training text, so that pgprune can be tried offline.

The model and its tokenizer were trained on text generated with seed 0. Text from any other seed is unseen.
"""
