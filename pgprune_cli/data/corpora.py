"""Where texts come from. A corpus is a name (c4, wikitext2, ptb, demo), a data set on the hub, or a local file.

A column other than `text` follows a colon: FILE:COLUMN, owner/name:CONFIG:COLUMN or owner/name::COLUMN. Calibration and
evaluation never read the same split of a named corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgprune_cli.console.hub_logging import quiet_hub
from pgprune_cli.console.suggest import nearest
from pgprune_cli.data.text_files import COLUMN, EXPECTED_FILE, FORMATS, GZIPPED, TextFile, find_file, text_of, texts_in
from pgprune_cli.errors import UserError
from pgprune_cli.storage.records import checksum

Purpose = Literal["calibration", "evaluation"]


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
    column: str = COLUMN
    joined: bool = False
    revision: str | None = None


NAMED = {
    "wikitext2": HubCorpus("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", joined=True),
    "c4": HubCorpus("allenai/c4", "en", "train", "validation"),
    # The PTB repository holds a script, which `datasets` no longer runs. The copy that the hub has converted has one
    # configuration, `default`.
    "ptb": HubCorpus("ptb-text-only/ptb_text_only", None, "train", "test", "sentence", True, "refs/convert/parquet"),
}

DEMO_TEXT: dict[Purpose, tuple[int, int]] = {"calibration": (2, 600_000), "evaluation": (3, 150_000)}
"""Seed and number of characters of the demo texts. The demo model was trained on seed 0 and validated on seed 1."""


def is_local(corpus: str) -> bool:
    """Return whether a corpus is on this machine whatever the hub says: the demo text, or an existing path."""
    return corpus == "demo" or (corpus not in NAMED and find_file(corpus) is not None)


def check_corpus(corpus: str) -> None:
    """Raise UserError unless `corpus` is the name of a corpus, or a file of a kind that is read. No file is opened."""
    if corpus == "demo":
        return
    if (file := _local_file(corpus)) is None:
        hub_corpus(corpus)
    else:
        _refuse_other_files(corpus, file)


def _local_file(corpus: str) -> TextFile | None:
    """Return the file that a corpus is, None for a named corpus or a data set on the hub."""
    return None if corpus in NAMED else find_file(corpus)


def _refuse_other_files(corpus: str, file: TextFile) -> None:
    if not (file.path.is_file() and file.format):
        raise UserError(f"{corpus}: this is not a {EXPECTED_FILE} file.")


def hub_corpus(corpus: str) -> HubCorpus:
    """Return the data set on the hub that `corpus` names. Raises UserError if no data set can have this name."""
    if corpus in NAMED:
        return NAMED[corpus]
    path, _, rest = corpus.partition(":")
    config, _, column = rest.partition(":")
    looks_local = corpus.startswith((".", "/", "~")) or path.lower().endswith((*FORMATS, *GZIPPED))
    if looks_local or path.count("/") != 1:
        hint = nearest(corpus, [*NAMED, "demo"]) or "."
        raise UserError(
            f"{corpus}: no such file or corpus{hint} Expected "
            f"{', '.join([*NAMED, 'demo'])}, a data set on the hub (owner/name or owner/name:config), or a "
            f"{EXPECTED_FILE} file."
        )
    return HubCorpus(path, config or None, "train", "test", column or COLUMN)


def text_identity(corpus: str, purpose: Purpose) -> str:
    """Return a string that changes whenever the text does: the content of a file, or the data set and its split.

    The name of a file does not matter, its column does. Raises UserError if the corpus does not exist.
    """
    if corpus == "demo":
        return f"demo:{DEMO_TEXT[purpose]}:{checksum(Path(__file__).parents[1] / 'demo' / 'grammar.py')}"
    if (file := _local_file(corpus)) is None:
        return f"{hub_corpus(corpus)}:{purpose}"
    _refuse_other_files(corpus, file)
    return f"{file.format}:{checksum(file.path)}" + (f":{file.column}" if file.column != COLUMN else "")


def documents(corpus: str, purpose: Purpose) -> Iterator[str]:
    """Yield the documents of a corpus in order. Raises UserError if it does not exist or cannot be read."""
    if corpus == "demo":
        from pgprune_cli.demo.grammar import generate

        yield generate(*DEMO_TEXT[purpose])
    elif corpus not in NAMED and (file := find_file(corpus)) is not None and file.path.is_file():
        yield from texts_in(file)
    else:
        yield from _documents_on_hub(corpus, purpose)


def _documents_on_hub(corpus: str, purpose: Purpose) -> Iterator[str]:
    dataset = hub_corpus(corpus)
    hub_name = corpus if corpus in NAMED else f"{dataset.path}:{dataset.config or ''}"
    texts = (text_of(row, dataset.column, corpus, hub_name) for row in rows_on_hub(corpus, purpose))
    if dataset.joined:
        yield "\n\n".join(text for text in texts if text is not None)
    else:
        yield from (text for text in texts if text)


def rows_on_hub(corpus: str, purpose: Purpose) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a data set on the hub in order. Raises UserError if it cannot be loaded."""
    dataset = hub_corpus(corpus)
    split = dataset.calibration if purpose == "calibration" else dataset.evaluation
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with quiet_hub():
            rows: Iterable[Mapping[str, Any]] = load_dataset(
                dataset.path, dataset.config, split=split, streaming=True, revision=dataset.revision
            )
            yield from rows
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
