"""Corpora → tokens → windows. A corpus is a name (c4, wikitext2, ptb, demo, or a hub data set) or a local file.

Calibration and evaluation never read the same split of a named corpus. Text is tokenised once and cached.
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


@dataclass(frozen=True)
class HubCorpus:
    """A data set of the hub: which configuration, which split serves which purpose, which column is the text.

    joined: the documents are the lines of one text (WikiText, PTB) and are tokenised as one; revision: of the data set.
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
    # PTB's own files are a script, which `datasets` no longer runs; the hub keeps a converted copy.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only", "penn_treebank", "train", "test", "sentence", True, "refs/convert/parquet"
    ),
}

DEMO_TEXT: dict[Purpose, tuple[int, int]] = {"calibration": (2, 600_000), "evaluation": (3, 150_000)}
"""Seed and characters of the demo grammar's texts; the demo model was trained on seed 0 and watched on seed 1."""


# --- reading


def documents(corpus: str, purpose: Purpose) -> Iterator[str]:
    """The corpus's texts in order. Raises UserError where it is not there or not readable."""
    if corpus == "demo":
        from pgprune_cli.demo.grammar import generate

        yield generate(*DEMO_TEXT[purpose])
    elif corpus not in NAMED and (path := Path(corpus).expanduser()).is_file():
        yield from _from_file(path)
    else:
        yield from _from_hub(corpus, purpose)


def _from_file(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path}: no column 'text' among {', '.join(file.schema_arrow.names)}")
            kind = file.schema_arrow.field("text").type
            if kind not in (pyarrow.string(), pyarrow.large_string()):
                raise UserError(f"{path}: column 'text' holds {kind}, not text")
            for batch in file.iter_batches(columns=["text"]):
                yield from (text for text in batch["text"].to_pylist() if text)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())})") from None
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                yield _text_of_row(line, f"{path}:{number}")
    else:
        yield _text(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text_of_row(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{place}: expected an object with a text in 'text'")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can say so, and no tokenizer takes it
        raise UserError(f"{place}: half of a surrogate pair (\\ud800 to \\udfff), which is no letter")
    return text


def _from_hub(corpus: str, purpose: Purpose) -> Iterator[str]:
    known = hub_corpus(corpus)
    split = known.calibration if purpose == "calibration" else known.evaluation
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with quiet_hub():
            rows: Iterable[dict[str, Any]] = load_dataset(
                known.path, known.config, split=split, streaming=True, revision=known.revision
            )
            texts = (row[known.column] for row in rows)
            if known.joined:
                yield "\n\n".join(texts)
            else:
                yield from texts
    except KeyError:
        raise UserError(f"{corpus}: its rows have no column {known.column!r}") from None
    except Exception as error:  # the hub client raises dozens of kinds, all of which mean: not to be had from here
        named = f"--ppl {corpus}=FILE, or in the recipe evaluation.corpora: [{corpus}=FILE]"
        instead = named if purpose == "evaluation" else "calibration.corpus: FILE"
        raise UserError(
            f"{corpus}: cannot be had from the hub ({' '.join(str(error).split())[:160]}); on an offline machine give "
            f"a local {', '.join(FORMATS)} file with the {split} text instead ({instead})"
        ) from None


def check_corpus(corpus: str) -> None:
    """Raises UserError for what is neither a file here nor the name of a corpus."""
    if corpus != "demo" and not Path(corpus).expanduser().exists():
        hub_corpus(corpus)


def hub_corpus(corpus: str) -> HubCorpus:
    """Where a corpus that is no file lies on the hub. Raises UserError for a name that none could have."""
    if corpus in NAMED:
        return NAMED[corpus]
    path, _, config = corpus.partition(":")
    looks_local = corpus.startswith((".", "/", "~")) or path.endswith(FORMATS)
    if looks_local or path.count("/") != 1:
        hint = nearest(corpus, [*NAMED, "demo"]) or ";"
        raise UserError(
            f"{corpus}: no such file, and not a corpus{hint} known are {', '.join([*NAMED, 'demo'])}, "
            f"a hub data set as owner/name or owner/name:config, and {', '.join(FORMATS)} files"
        )
    return HubCorpus(path, config or None, "train", "test")


# --- tokenising


def text_identity(corpus: str, purpose: Purpose) -> str:
    """What the text depends on: a file's content, whatever its name; a named corpus's split. Raises UserError."""
    if corpus == "demo":
        return f"demo:{DEMO_TEXT[purpose]}:{checksum(Path(__file__).parents[1] / 'demo' / 'grammar.py')}"
    path = Path(corpus).expanduser()
    if corpus in NAMED or not path.exists():
        return f"{hub_corpus(corpus)}:{purpose}"
    if path.is_dir() or path.suffix not in FORMATS:
        raise UserError(f"{corpus}: expected a {', '.join(FORMATS)} file")
    return f"{path.suffix}:{checksum(path)}"
