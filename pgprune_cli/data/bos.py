"""Decide whether windows begin with the BOS token (beginning of sequence).

Gemma was trained on texts that begin with BOS, and predicts badly without it. Llama's tokenizer adds BOS to each
document too, but published perplexities of Llama, Mistral and Qwen are measured on windows without it.
"""

from __future__ import annotations

from typing import Any, Literal

from pgprune_cli.errors import UserError


def bos_token(setting: Literal["auto"] | bool, tokenizer: Any, trained_with_bos: bool, name: str) -> int | None:
    """Return the token that every window begins with, None if windows hold only the text.

    trained_with_bos: whether models of this family were trained on texts that begin with BOS. `auto` follows it if the
    tokenizer adds BOS to a text. name: the model, for the error message.

    Raises UserError if the setting is true and the tokenizer has no BOS token.
    """
    if setting == "auto":
        setting = trained_with_bos and adds_bos(tokenizer)
    if not setting:
        return None
    token: int | None = tokenizer.bos_token_id
    if token is None:
        raise UserError(f"{name}: its tokenizer has no BOS token, so no window can begin with it. Set bos to false.")
    return token


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts BOS in front of a text.

    It is asked for the tokens of a text, because its attribute `add_bos_token` need not agree with what it does.
    """
    token = tokenizer.bos_token_id
    return token is not None and tokenizer("x")["input_ids"][:1] == [token]
