"""Corpora → tokens → windows. A corpus is a name (c4, wikitext2, ptb, demo, or a hub data set) or a local file.

Calibration and evaluation never read the same split of a named corpus. Text is tokenised once and cached.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pgprune_cli.console.hub_logging import quiet_hub
from pgprune_cli.console.stderr import STDERR
from pgprune_cli.console.suggest import nearest
from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import SEAL, checksum, metadata, read_tensors, write_bytes

Purpose = Literal["calibration", "evaluation"]

FORMATS = (".txt", ".jsonl", ".parquet")
DOCUMENTS_AT_A_TIME = 64


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


def cache_directory() -> Path:
    """Where tokenised corpora are kept: $PGPRUNE_CACHE, else pgprune under the user's cache directory."""
    if "PGPRUNE_CACHE" in os.environ:
        return Path(os.environ["PGPRUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pgprune"


def tokens_of(corpus: str, purpose: Purpose, tokenizer: Any, wanted: int | None = None) -> Tensor:
    """The corpus as one stream of tokens `(N,)` int64, at least `wanted` of them where the corpus has as many.

    Raises UserError for a corpus that is not there, cannot be read, is empty or cannot be reached.
    """
    identity = text_identity(corpus, purpose)
    key = hashlib.sha256(json.dumps([identity, wanted, _tokenizer_identity(tokenizer)]).encode()).hexdigest()
    cached = cache_directory() / "tokens" / f"{key[:32]}.safetensors"
    if (tokens := _cached(cached)) is not None:
        return tokens
    tokens = _tokenise(documents(corpus, purpose), tokenizer, wanted)
    if not tokens.numel():
        raise UserError(f"{corpus}: holds no text")
    _keep(cached, tokens)
    return tokens


def _cached(path: Path) -> Tensor | None:
    """The tokens that `_keep` kept, None where there are none or they are not whole: they can be made again."""
    try:
        found = read_tensors(path)["tokens"].int()
        whole = metadata(path).get(SEAL) == _digest(found)
    except (UserError, OSError, KeyError):
        return None
    return found.long() if whole else None


def _keep(path: Path, tokens: Tensor) -> None:
    """Without a place to keep them in, a run goes on and says so."""
    from safetensors.torch import save

    try:
        write_bytes(path, save({"tokens": tokens.int()}, {SEAL: _digest(tokens.int())}))
    except OSError as error:
        print(f"pgprune: {path}: {error.strerror or error}; the tokens of the text are not kept", file=STDERR)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def check_vocabulary(tokens: Tensor, corpus: str, embeddings: int) -> None:
    """Raises UserError where a corpus was cut into tokens that a model of so many embeddings has none of."""
    if tokens.numel() and int(tokens.max()) >= embeddings:
        raise UserError(
            f"{corpus}: its tokens go up to number {int(tokens.max())}, and the model has {embeddings} embeddings: "
            "the tokenizer beside it is another model's"
        )


@dataclass(frozen=True)
class CalibrationText:
    """Windows `(N, T)` int64 to search over, and others, from the end of the text, only to judge by."""

    search: Tensor
    heldout: Tensor
    stream: Tensor

    def long_windows(self, count: int, seqlen: int) -> Tensor:
        """At most `count` windows `(N, seqlen)` of the searched-over part, spread over it."""
        return spread(windows(self.stream, min(seqlen, len(self.stream))), count)


def calibration_text(corpus: str, tokenizer: Any, sequences: int, heldout: int, seqlen: int) -> CalibrationText:
    """At most `sequences` windows of `seqlen` tokens spread over the corpus, and `heldout` that no search sees.

    Raises UserError for a corpus too short for one window of each.
    """
    tokens = tokens_of(corpus, "calibration", tokenizer, wanted=(sequences + heldout) * seqlen)
    kept_apart = heldout * seqlen
    if len(tokens) < kept_apart + seqlen:
        raise UserError(
            f"{corpus}: {len(tokens)} tokens are too few for {heldout} held-out windows of {seqlen} and one to search "
            "over; give more text, or lower calibration.heldout or calibration.seqlen"
        )
    stream = tokens[: len(tokens) - kept_apart]
    return CalibrationText(
        spread(windows(stream, seqlen), sequences), tokens[len(tokens) - kept_apart :].view(heldout, seqlen), stream
    )


def windows(tokens: Tensor, seqlen: int) -> Tensor:
    """The stream `(N,)` cut into whole windows `(N // seqlen, seqlen)`; a last part of one is left out."""
    return tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` rows at even distances, or all when there are fewer."""
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


@dataclass(frozen=True)
class Batches:
    """Windows `(N, T)` in a seeded order, shuffled anew every epoch. A position names a batch: no state to lose."""

    windows: Tensor
    batch: int
    seed: int

    def at(self, position: int) -> Tensor:
        """The batch `(B, T)` at a position ≥ 0; the last windows of an epoch that make no whole batch are left out."""
        size = min(self.batch, len(self.windows))
        an_epoch = len(self.windows) // size
        epoch, place = divmod(position, an_epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        order = torch.randperm(len(self.windows), generator=generator)
        return self.windows[order[place * size : (place + 1) * size]]


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


def _tokenizer_identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{described}{tokenizer.bos_token}{tokenizer.eos_token}".encode()).hexdigest()


def _tokenise(documents: Iterator[str], tokenizer: Any, wanted: int | None) -> Tensor:
    pieces: list[list[int]] = []
    total = 0
    while some := [document for _, document in zip(range(DOCUMENTS_AT_A_TIME), documents, strict=False)]:
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            pieces.append(ids)
            total += len(ids)
        if wanted is not None and total >= wanted:
            break
    return torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
