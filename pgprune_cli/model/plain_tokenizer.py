"""Writes a tokenizer so that it gives the same token ids under another model type and in other versions.

transformers chooses the class of a tokenizer by the model type and by `tokenizer_class`, differently in every version,
and some classes put a pre-tokenizer and normaliser of their own in place of those in tokenizer.json. Therefore the
tokenizer is written as transformers has built it for this model, under the class that takes tokenizer.json as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import read_json, write_json

CONFIG = "tokenizer_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
MACHINE_KEYS = ("auto_map", "backend", "from_slow", "is_local", "local_files_only", "name_or_path", "tokenizer_file")
"""Keys of tokenizer_config.json about the process that wrote it, or about another class."""


def write_plain(tokenizer: Any, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, or change them if they are there.

    tokenizer: a fast one, loaded by transformers.
    """
    write_bytes(directory / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    write_json(directory / CONFIG, _config(tokenizer, directory / CONFIG))


def _config(tokenizer: Any, path: Path) -> dict[str, Any]:
    """Return tokenizer_config.json for the plain class. path: the base model's, whose other keys are kept.

    What the class of the base model's tokenizer sets by itself is written down, since the plain class does not set it.
    """
    base = read_json(path) if path.exists() else {}
    config = {key: value for key, value in base.items() if key not in MACHINE_KEYS}
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(tokenizer, name, None)
        if isinstance(token, str) and _content(config.get(name)) != token:
            config[name] = token
    if not isinstance(config.get("extra_special_tokens"), dict):
        # transformers 4 knows these under another name, which transformers 5 reads as well
        config.pop("extra_special_tokens", None)
        if tokens := [str(token) for token in tokenizer.extra_special_tokens]:
            config["additional_special_tokens"] = tokens
    for name in ("clean_up_tokenization_spaces", "model_input_names", "model_max_length", "padding_side"):
        config[name] = getattr(tokenizer, name)
    splitter = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in splitter:  # transformers changes it to the value of the config
        config["add_prefix_space"] = splitter["add_prefix_space"]
    return config | {"tokenizer_class": PLAIN_CLASS}


def _content(token: Any) -> Any:
    """Return the text of a special token in tokenizer_config.json, where it may be an object."""
    return token.get("content") if isinstance(token, dict) else token
