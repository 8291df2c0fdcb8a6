"""Corpora, tokens and windows."""
