"""Keeps the libraries of Hugging Face from logging what pgprune reports itself, once, or what it is about to repair."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def quiet_hub() -> AbstractContextManager[None]:
    """Let the hub's client log only errors for as long as the `with` lasts."""
    from huggingface_hub.utils import logging

    return _only_errors(logging)


def quiet_transformers() -> AbstractContextManager[None]:
    """Let transformers log only errors for as long as the `with` lasts."""
    from transformers.utils import logging

    return _only_errors(logging)


@contextmanager
def _only_errors(logging: Any) -> Iterator[None]:
    """Lower the verbosity of a library, given its logging module, for as long as the `with` lasts."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
