"""Writes a tokenizer as GGUF metadata: tokens, merges or scores, special tokens, chat template.

If the base model is a GGUF file, its own metadata is copied. Otherwise the metadata is made from `tokenizer.json`,
which defines a fast tokenizer. Two kinds are supported: BPE over bytes (`gpt2` in llama.cpp), and BPE over characters
with a fallback to bytes, as SentencePiece makes it (`llama`).
"""

from __future__ import annotations

import json
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import Source

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}": "qwen2",
    rf"{LOWER}|{UPPER}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}": "tekken",
    rf"{LOWER}{CONTRACTIONS}?|{UPPER}{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}": "gpt-4o",
}
"""llama.cpp's names for the ways to split text before the merges, by the regular expression that does it."""

USE_HF = "Export the model with --format hf."


def add_tokenizer(writer: Any, source: Source, vocabulary: int) -> list[str]:
    """Add the tokenizer of `source` to the metadata of a GGUFWriter. vocabulary: number of embeddings of the model.

    Return the added tokens that are left out, because the model has no embedding for them. Raises UserError if there is
    no tokenizer, or one of a kind that llama.cpp does not support or pgprune does not write.
    """
    if source.gguf is not None:
        _copy_metadata(writer, source)
        return []
    tokenizer = load_tokenizer(source)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{source.name}: its tokenizer has no tokenizer.json, which --format gguf needs. {USE_HF}")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model = definition["model"]
    splitters = _steps(definition["pre_tokenizer"], "pretokenizers")
    if model["type"] != "BPE" or not (model["byte_fallback"] or any(step["type"] == "ByteLevel" for step in splitters)):
        raise UserError(
            f"{source.name}: its tokenizer is {model['type']}, but llama.cpp supports only BPE over bytes. {USE_HF}"
        )
    _refuse_rewriting(source.name, _steps(definition["normalizer"], "normalizers"), model["byte_fallback"])
    added = {token["id"]: token for token in definition["added_tokens"]}
    _add_tokens(writer, source.name, model, added, vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, merges, vocabulary))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(source.name, splitters))
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer, vocabulary)
    return [added[index]["content"] for index in sorted(added) if index >= vocabulary]


def _copy_metadata(writer: Any, source: Source) -> None:
    import gguf

    reader = gguf.GGUFReader(source.directory / str(source.gguf))
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], kind)


def _steps(definition: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer or normalizer: several under `key` if it is a sequence, one, or none."""
    if definition is None:
        return []
    return definition[key] if definition["type"] == "Sequence" else [definition]


def _refuse_rewriting(name: str, normalizers: list[dict[str, Any]], byte_fallback: bool) -> None:
    """Raise UserError for a normalizer that changes text in a way that llama.cpp does not.

    llama.cpp only replaces spaces, as SentencePiece does. Unicode composition (NFC) is accepted, as in llama.cpp's own
    converter: most text is composed already.
    """
    supported = ("Prepend", "Replace") if byte_fallback else ("NFC",)
    if unsupported := [step["type"] for step in normalizers if step["type"] not in supported]:
        raise UserError(
            f"{name}: its tokenizer normalises text with {', '.join(unsupported)}, which llama.cpp does not support. "
            f"{USE_HF}"
        )


def _split_name(name: str, splitters: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name for the way in which a BPE over bytes splits text. Raises UserError if it has none."""
    kinds = [splitter["type"] for splitter in splitters]
    last = splitters[-1]
    if kinds == ["ByteLevel"] and last["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and last["use_regex"] and splitters[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        pattern = splitters[0]["pattern"].get("Regex")
        if pattern in SPLITS:
            return SPLITS[pattern]
    steps = json.dumps(splitters)
    raise UserError(
        f"{name}: its tokenizer splits text in a way that pgprune does not write to GGUF: {steps}. {USE_HF}"
    )


def _add_tokens(writer: Any, name: str, model: dict[str, Any], added: dict[int, Any], vocabulary: int) -> None:
    """Add text and type of every token. Embeddings without a token, with which some models are padded, get a name."""
    from gguf import TokenType

    texts = {index: text for text, index in model["vocab"].items()}
    if (largest := max(texts.keys() - added.keys(), default=0)) >= vocabulary:
        raise UserError(
            f"{name}: its tokenizer has the token {largest}, but the model has only {vocabulary} embeddings. "
            "Use the tokenizer that belongs to the model."
        )
    tokens, types = [], []
    for index in range(vocabulary):
        if index in added:
            text = added[index]["content"]
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
            if model["byte_fallback"] and kind == TokenType.USER_DEFINED:
                text = text.replace("▁", " ")
        elif index in texts:
            text, kind = texts[index], TokenType.NORMAL
            if model["byte_fallback"] and _is_byte(text):
                kind = TokenType.BYTE
        else:
            text, kind = f"[PAD{index}]", TokenType.UNUSED
        if text == model["unk_token"]:
            kind = TokenType.UNKNOWN
        tokens.append(text)
        types.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(model: dict[str, Any], merges: list[str], vocabulary: int) -> list[float]:
    """Return the scores of SentencePiece, which makes the merge whose result has the highest score first."""
    rank: dict[str, int] = {}
    for order, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), order)
    texts = {index: text for text, index in model["vocab"].items()}
    return [float(-rank.get(texts.get(index, ""), len(merges))) for index in range(vocabulary)]


def _add_special(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Add the ids of special tokens, whether encoding adds them, and the chat template."""
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None and index < vocabulary:
            getattr(writer, f"add_{kind}_token_id")(index)
    plain, encoded = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    before = encoded[: len(encoded) - len(plain)] if encoded[-len(plain) :] == plain else encoded[:1]
    writer.add_add_bos_token(bool(before) and before[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(encoded[-1] != plain[-1] and encoded[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
