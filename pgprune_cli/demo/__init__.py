"""A tiny language model and the grammar it was trained on, so that pgprune can be tried without any download.

The model was trained on text of seed 0, its tokenizer too; text of any other seed is new to it.
"""
