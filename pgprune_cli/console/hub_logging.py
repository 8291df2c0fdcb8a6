"""Keeps the libraries of Hugging Face from logging what pgprune reports itself, once, or what it is about to repair."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Let the hub's client log only errors for as long as the `with` lasts."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log only errors for as long as the `with` lasts."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
