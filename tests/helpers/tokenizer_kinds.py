"""Tokenizers of many kinds, as the directories of base models have them, and exports of them without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from helpers.models import TEXT
from pgprune_cli.model.source import Source
from pgprune_cli.model.tokenizer_files import write_tokenizer
from pgprune_cli.storage.records import write_json

SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
BY_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
LEARNED = [TEXT, "the dog and the quick brown fox, they're told 12345.67", "def f(x):\n    return x", "[INST] the dog"]


def _byte_level(splitter: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LEARNED * 4, trainer)
    return tokenizer


def by_regex(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(legacy: bool) -> Tokenizer:
    """Return a BPE over characters with bytes for unknown ones, as tokenizer.json has it for Llama 2 and Mistral."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    size = 200
    trained.train_from_iterator(
        LEARNED * 4, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {
    "byte-level": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte-level, prefix": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words": lambda: _byte_level(by_regex(BY_WORD), normalizers.NFC()),
    "three digits": lambda: _byte_level(by_regex(BY_WORD.replace(r"\p{N}|", r"\p{N}{1,3}|"))),
    "sentencepiece, legacy": lambda: _sentencepiece(True),
    "sentencepiece": lambda: _sentencepiece(False),
}
CLASSES = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"),
    *("GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "legacy": {"legacy": True},
    "not legacy": {"legacy": False},
    "add bos": {"add_bos_token": True, "add_eos_token": False, "legacy": False},
    "add neither": {"add_bos_token": False, "add_eos_token": False},
}
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "llama": ("pruned_llama", "llama", "mistral"),
    **{
        kind: (f"pruned_{kind}", kind)
        for kind in ("mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "granite", "olmo2", "qwen3_5_text")
    },
}
"""The model types of exports, by that of the base. A Llama can become a Mistral."""


@cache
def _definition(kind: str, bos: bool) -> str:
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("wordpiece", single_word=True)])
    tokenizer.add_special_tokens([AddedToken("<image>", rstrip=True), AddedToken("<|im_start|>")])
    template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", 1)]}
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(**template)
    return str(tokenizer.to_str())


def save_base(directory: Path, model_type: str, kind: str, bos: bool, declared: str | None, options: str) -> Source:
    """Write the tokenizer and a config.json of a base model, and return where it is."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_text(_definition(kind, bos))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    config |= {"additional_special_tokens": ["<image>", "<|im_start|>"]} | OPTIONS[options]
    config |= {} if declared is None else {"tokenizer_class": declared}
    write_json(directory / "tokenizer_config.json", config | {"chat_template": "{{ messages[0]['content'] }}"})
    write_json(directory / "config.json", {"model_type": model_type})
    return Source(str(directory), directory, None)


def export_tokenizer(source: Source, directory: Path, model_type: str) -> None:
    """Write the files of the tokenizer and a config.json of an export, as `hf.plan(...).write` does."""
    directory.mkdir()
    write_json(directory / "config.json", {"model_type": model_type})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source.directory / name).read_bytes())
    write_tokenizer(source, directory)


def bases(folder: Path, step: int, *model_types: str) -> Iterator[tuple[Source, str]]:
    """Write every `step`-th combination of kinds, and yield where it is and its model type. Default: of all types."""
    combinations = product(model_types or MODEL_TYPES, KINDS, (True, False), CLASSES, OPTIONS)
    for index, combination in enumerate(islice(combinations, 0, None, step)):
        yield save_base(folder / str(index), *combination), combination[0]
