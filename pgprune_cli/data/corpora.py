"""Where texts come from. A corpus is a name (c4, wikitext2, ptb, demo), a data set on the hub, or a local file.

Calibration and evaluation never read the same split of a named corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgprune_cli.console.hub_logging import quiet_hub
from pgprune_cli.console.suggest import nearest
from pgprune_cli.errors import UserError
from pgprune_cli.storage.records import checksum

Purpose = Literal["calibration", "evaluation"]

FORMATS = (".txt", ".jsonl", ".parquet")
EXPECTED_FILE = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the hub. Its repr is part of the token cache's keys.

    path, config, revision: the arguments of `datasets.load_dataset`; calibration, evaluation: the split for each
    purpose; column: the column that holds the text; joined: whether the rows are lines of one document (WikiText,
    PTB), which is tokenized as a whole.
    """

    path: str
    config: str | None
    calibration: str
    evaluation: str
    column: str = "text"
    joined: bool = False
    revision: str | None = None


NAMED = {
    "wikitext2": HubCorpus("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", joined=True),
    "c4": HubCorpus("allenai/c4", "en", "train", "validation"),
    # The PTB repository holds a script, which `datasets` no longer runs; the hub keeps a converted copy.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only", "penn_treebank", "train", "test", "sentence", True, "refs/convert/parquet"
    ),
}

DEMO_TEXT: dict[Purpose, tuple[int, int]] = {"calibration": (2, 600_000), "evaluation": (3, 150_000)}
"""Seed and number of characters of the demo texts. The demo model was trained on seed 0 and validated on seed 1."""


def is_local(corpus: str) -> bool:
    """Return whether a corpus is on this machine whatever the hub says: the demo text, or an existing path."""
    return corpus == "demo" or (corpus not in NAMED and Path(corpus).expanduser().exists())


def check_corpus(corpus: str) -> None:
    """Raise UserError if `corpus` is neither an existing path nor the name of a corpus."""
    if not is_local(corpus):
        hub_corpus(corpus)


def hub_corpus(corpus: str) -> HubCorpus:
    """Return the data set on the hub that `corpus` names. Raises UserError if no data set can have this name."""
    if corpus in NAMED:
        return NAMED[corpus]
    path, _, config = corpus.partition(":")
    looks_local = corpus.startswith((".", "/", "~")) or path.endswith(FORMATS)
    if looks_local or path.count("/") != 1:
        hint = nearest(corpus, [*NAMED, "demo"]) or "."
        raise UserError(
            f"{corpus}: no such file or corpus{hint} Expected "
            f"{', '.join([*NAMED, 'demo'])}, a data set on the hub (owner/name or owner/name:config), or a "
            f"{EXPECTED_FILE} file."
        )
    return HubCorpus(path, config or None, "train", "test")


def text_identity(corpus: str, purpose: Purpose) -> str:
    """Return a string that changes whenever the text does: the content of a file, or the data set and its split.

    The name of a file does not matter. Raises UserError if the corpus does not exist.
    """
    if corpus == "demo":
        return f"demo:{DEMO_TEXT[purpose]}:{checksum(Path(__file__).parents[1] / 'demo' / 'grammar.py')}"
    path = Path(corpus).expanduser()
    if corpus in NAMED or not path.exists():
        return f"{hub_corpus(corpus)}:{purpose}"
    if path.is_dir() or path.suffix not in FORMATS:
        raise UserError(f"{corpus}: this is not a {EXPECTED_FILE} file.")
    return f"{path.suffix}:{checksum(path)}"


def documents(corpus: str, purpose: Purpose) -> Iterator[str]:
    """Yield the documents of a corpus in order. Raises UserError if it does not exist or cannot be read."""
    if corpus == "demo":
        from pgprune_cli.demo.grammar import generate

        yield generate(*DEMO_TEXT[purpose])
    elif corpus not in NAMED and (path := Path(corpus).expanduser()).is_file():
        yield from _documents_in_file(path)
    else:
        yield from _documents_on_hub(corpus, purpose)


def _documents_in_file(path: Path) -> Iterator[str]:
    """Yield the whole of a text file, or the `text` of every row."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".jsonl":
        # Not str.splitlines: JSON allows bare U+2028 and U+0085 inside a string.
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if line.strip():
                yield _text_of_row(line, f"{path}:{number}")
    else:
        yield _read_text(path)


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path}: there is no column 'text'. The columns are {', '.join(file.schema_arrow.names)}.")
        dtype = file.schema_arrow.field("text").type
        if dtype not in (pyarrow.string(), pyarrow.large_string()):
            raise UserError(f"{path}: column 'text' holds {dtype}, not text.")
        for batch in file.iter_batches(columns=["text"]):
            yield from (text for text in batch["text"].to_pylist() if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: this is not a readable parquet file ({' '.join(str(error).split())}).") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}).") from None


def _text_of_row(line: str, place: str) -> str:
    """Return the text in one line of a JSONL file; `place` is the file and line number for error messages."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: this line is not JSON ({error}).") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{place}: expected a JSON object with a string under the key 'text'.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can escape these, but no tokenizer takes them
        raise UserError(f"{place}: the text contains an unpaired surrogate (\\ud800 to \\udfff).")
    return text


def _documents_on_hub(corpus: str, purpose: Purpose) -> Iterator[str]:
    dataset = hub_corpus(corpus)
    split = dataset.calibration if purpose == "calibration" else dataset.evaluation
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with quiet_hub():
            rows: Iterable[dict[str, Any]] = load_dataset(
                dataset.path, dataset.config, split=split, streaming=True, revision=dataset.revision
            )
            texts = (row[dataset.column] for row in rows)
            if dataset.joined:
                yield "\n\n".join(texts)
            else:
                yield from texts
    except KeyError:
        raise UserError(f"{corpus}: the data set has no column {dataset.column!r}.") from None
    except Exception as error:  # the hub client raises dozens of types, and all mean that the text cannot be loaded
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{corpus}: cannot load the data set from the hub ({reason}). To work offline, give a local "
            f"{EXPECTED_FILE} file with the {split} split: {_file_option(corpus, purpose)}."
        ) from None


def _file_option(corpus: str, purpose: Purpose) -> str:
    """Return the option or recipe key that reads a local file in place of a corpus."""
    if purpose == "calibration":
        return "`calibration.corpus: FILE`"
    return f"`--ppl {corpus}=FILE`, or `evaluation.corpora: [{corpus}=FILE]` in the recipe"
