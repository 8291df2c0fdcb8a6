"""Have a GGUF file parsed once where transformers would parse it for config, tokenizer and weights each.

Its reader makes several Python objects of every token of the vocabulary, which takes seconds, and it makes the map of
the names of tensors anew for every module of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from pgprune_cli.model.source import Source


@contextmanager
def parsed_once(source: Source) -> Iterator[None]:
    """Inside the `with`, what the library gguf has parsed of files is used again. Files must not change meanwhile."""
    if source.gguf is None or find_spec("gguf") is None:  # without the library, transformers says what to install
        yield
        return
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
