"""Let a model write text, to calibrate on: alone where there is no other text, or mixed with text from elsewhere.

    python scripts/sample_text.py MODEL --out sampled.jsonl [--documents 256] [--tokens 128] [--seed 0]

MODEL: anything a recipe's `model` may be. Every document begins behind one special token that is not written: by
default what separated the documents of the training, `<|endoftext|>`, or the BOS token. All others are drawn from the
model's own distribution, at temperature 1. The file has a row {"text": …} for each document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgprune_cli.data.tokens import first_token, ordinary_tokens
from pgprune_cli.errors import UserError
from pgprune_cli.forward.sampling import sampled_batches
from pgprune_cli.model.loading import load_model, load_tokenizer
from pgprune_cli.model.source import resolve
from pgprune_cli.storage.atomic import new_file

DTYPES = ("auto", "float32", "float16", "bfloat16")


def count(text: str) -> int:
    """Return a whole number above 0. Raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def chosen_token(tokenizer: Any, chosen: str | None, name: str) -> int:
    """Return the id of the token that documents begin behind. Raises UserError if there is none."""
    if chosen is None:
        return first_token(tokenizer, name, "Name a token with --first.")
    if (token := tokenizer.get_vocab().get(chosen)) is None:
        raise UserError(f"--first: the tokenizer has no token {chosen}.")
    return int(token)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file, which is replaced")
    parser.add_argument("--documents", type=count, default=256, help="how many (default: 256)")
    parser.add_argument("--tokens", type=count, default=128, help="in each document (default: 128)")
    parser.add_argument("--batch", type=count, default=128, help="documents that are written at once (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="the same one writes the same text (default: 0)")
    parser.add_argument("--first", help="the token that documents begin behind")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model (default: as stored)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    options = parser.parse_args(arguments)
    source = resolve(options.model)
    tokenizer = load_tokenizer(source)
    first = chosen_token(tokenizer, options.first, source.name)
    model = load_model(source, options.dtype, options.device)
    ordinary = ordinary_tokens(tokenizer, model.get_output_embeddings().weight.shape[0])
    starts = range(0, options.documents, options.batch)
    shapes = [(min(options.batch, options.documents - start), options.tokens) for start in starts]
    written = 0
    with new_file(options.out) as temporary, temporary.open("w", encoding="utf-8") as out:
        for rows in sampled_batches(model, first, ordinary, shapes, options.seed):
            for text in tokenizer.batch_decode(rows):
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(rows)
            print(f"{written} of {options.documents} documents", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
