"""A tokenizer as GGUF metadata: tokens, merges or scores, special tokens, chat template.

Where the base is a GGUF file, its own metadata is copied. Otherwise it is made from what transformers' fast tokenizer
is in truth, its `tokenizer.json`: BPE over bytes (llama.cpp's `gpt2`), or over characters with bytes to fall back on,
as SentencePiece makes it (`llama`).
"""

from __future__ import annotations

import json
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import Source

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}": "tekken",
}
"""llama.cpp's name of the way in which text is split before the merges, by the regular expression that does it."""


def add_tokenizer(writer: Any, source: Source, vocabulary: int) -> None:
    """Puts the tokenizer of `source`, for a model of `vocabulary` embeddings, into a GGUFWriter's metadata.

    Raises UserError where there is none, or it is of a kind that llama.cpp does not know.
    """
    if source.gguf is not None:
        _copy(writer, source)
        return
    tokenizer = load_tokenizer(source)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{source.name}: its tokenizer has no tokenizer.json, which a GGUF file is made from")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    splitters = _flat(described["pre_tokenizer"], "pretokenizers")
    if model["type"] != "BPE" or not (model["byte_fallback"] or any(s["type"] == "ByteLevel" for s in splitters)):
        raise UserError(f"{source.name}: its tokenizer is {model['type']}, and llama.cpp knows BPE over bytes only")
    _refuse_rewriting(source.name, _flat(described["normalizer"], "normalizers"), model["byte_fallback"])
    added = {token["id"]: token for token in described["added_tokens"]}
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
    _add_special(writer, tokenizer)


def _copy(writer: Any, source: Source) -> None:
    import gguf

    reader = gguf.GGUFReader(source.directory / str(source.gguf))
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], kind)


def _flat(described: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, which may be a sequence of them, or none at all."""
    if described is None:
        return []
    return described[inner] if described["type"] == "Sequence" else [described]


def _refuse_rewriting(name: str, normalizers: list[dict[str, Any]], byte_fallback: bool) -> None:
    """llama.cpp rewrites no text before it splits it, but for SentencePiece's spaces. Composed letters (NFC) are let
    pass, as llama.cpp's own converter does: text mostly has them composed."""
    known = ("Prepend", "Replace") if byte_fallback else ("NFC",)
    if other := [step["type"] for step in normalizers if step["type"] not in known]:
        raise UserError(f"{name}: its tokenizer rewrites text first ({', '.join(other)}), which llama.cpp does not")


def _split_name(name: str, splitters: list[dict[str, Any]]) -> str:
    """llama.cpp's name for how a BPE over bytes splits its text first."""
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
    raise UserError(f"{name}: its tokenizer splits text in a way that llama.cpp has no name for: {steps}")


def _add_tokens(writer: Any, name: str, model: dict[str, Any], added: dict[int, Any], vocabulary: int) -> None:
    """Every token's text and type. Embeddings without a token, which pad some models, get a text of their own."""
    from gguf import TokenType

    texts = {index: text for text, index in model["vocab"].items()}
    if (most := max({*texts, *added})) >= vocabulary:
        raise UserError(f"{name}: its tokenizer has the token {most}, and the model {vocabulary} embeddings")
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
    """SentencePiece's scores: of two merges, the one that makes the token of the higher score goes first."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), place)
    texts = {index: text for text, index in model["vocab"].items()}
    return [float(-rank.get(texts.get(index, ""), len(merges))) for index in range(vocabulary)]


def _add_special(writer: Any, tokenizer: Any) -> None:
    """The ids that start, end and fill, whether encoding adds them, and the chat template."""
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    before = whole[: len(whole) - len(plain)] if whole[-len(plain) :] == plain else whole[:1]
    writer.add_add_bos_token(bool(before) and before[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(whole[-1] != plain[-1] and whole[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)
