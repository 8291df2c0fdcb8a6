"""The predictions of a dense model on disk, so that no recovery that trains towards them needs the model in memory.

They hold the log-probabilities of the k most likely tokens at every position in float16, and their ids in 16 bits if
the vocabulary has no more than 65,536 tokens, otherwise in 32. A shard is whole or absent and has a checksum, so
writing resumes at the first missing one. The record says what the predictions depend on: the model, the text, k and the
temperature. Recoveries that agree in these share a cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.recover.teacher import Targets
from pgprune_cli.recover.texts import RecoveryText
from pgprune_cli.run.layout import TEACHER_RECORD, teacher_shard
from pgprune_cli.storage.records import (
    json_digest,
    metadata,
    read_record,
    read_tensors,
    refuse_newer,
    tensors_digest,
    with_checksum,
)

VERSION = 1

SHARD_BYTES = 1 << 25
"""Size of a shard, at most, unless one window is larger: what an interruption may cost."""

HEADER_BYTES = 1 << 10
"""The header of a shard is smaller than this."""

LOG_PROBS, TOKENS, ABOUT = "log_probs", "tokens", "pgprune"


@dataclass(frozen=True)
class CacheKey:
    """What cached predictions depend on.

    teacher: fingerprint of the dense model; text: digest of the windows; windows, seqlen: how many there are, and their
    tokens; vocabulary: the dense model's; top_k: how many tokens of every position are stored, at most all;
    temperature: divides the logits.
    """

    teacher: str
    text: str
    windows: int
    seqlen: int
    vocabulary: int
    top_k: int
    temperature: float

    @classmethod
    def of(cls, teacher: str, text: RecoveryText, vocabulary: int, top_k: int, temperature: float) -> CacheKey:
        """Return the key for a teacher, given its fingerprint and vocabulary, and a text."""
        windows, seqlen = text.windows.shape
        return cls(teacher, text.digest, windows, seqlen, vocabulary, min(top_k, vocabulary), float(temperature))

    @cached_property
    def digest(self) -> str:
        """The sha256 of the key, as hex."""
        return json_digest(asdict(self))

    def folder_in(self, shared: Path) -> Path:
        """Return the folder of this cache in a directory that holds many."""
        return shared / self.digest[:16]

    @property
    def token_dtype(self) -> torch.dtype | None:
        """The dtype of the stored ids, None if all tokens are stored, in order."""
        if self.top_k == self.vocabulary:
            return None
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32

    @property
    def window_bytes(self) -> int:
        """The size of the predictions on one window."""
        return self.seqlen * self.top_k * (2 + (self.token_dtype.itemsize if self.token_dtype else 0))

    @property
    def shards(self) -> list[range]:
        """The windows of every shard."""
        size = max(1, SHARD_BYTES // self.window_bytes)
        return [range(first, min(first + size, self.windows)) for first in range(0, self.windows, size)]

    def bytes_of(self, shards: Sequence[range]) -> int:
        """Return the size of some shards on disk, with at most 1 kB too much for each."""
        return sum(len(windows) * self.window_bytes + HEADER_BYTES for windows in shards)


class CachedTeacher:
    """Predictions on disk. They are mapped into memory, and the processes of one machine share a single copy.

    covered: the probability of the stored tokens, the mean over the positions that are trained on.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        """Open a finished cache and check every byte of it.

        Raises:
            UserError: it is damaged, unfinished, or holds the predictions of another model or on another text.
        """
        covered = read_covered(folder, key)
        if covered is None:
            raise UserError(f"{folder}: the dense model's predictions are not complete. Run the recovery again.")
        self.covered = covered
        self._per_shard = len(key.shards[0])
        self._shards = [open_shard(folder, key, index)[0] for index in range(len(key.shards))]

    def targets(self, windows: Tensor, rows: Tensor) -> Targets:
        """Return the targets for the windows `rows` `(B,)` of the text. Their probabilities are rounded to float16."""
        places = [divmod(row, self._per_shard) for row in rows.tolist()]

        def stored(name: str, dtype: torch.dtype) -> Tensor:
            parts = [self._shards[shard][name][index].to(dtype) for shard, index in places]
            return torch.stack(parts).to(windows.device, non_blocking=True)

        ids = stored(TOKENS, torch.int64) if TOKENS in self._shards[0] else None
        return Targets(stored(LOG_PROBS, torch.float32), ids)


def record_of(key: CacheKey, covered: float | None) -> dict[str, Any]:
    """Return the content of the record. covered: the covered probability, None until the cache is finished."""
    return {"version": VERSION, **asdict(key), "covered": covered}


def read_covered(folder: Path, key: CacheKey) -> float | None:
    """Return the probability that a finished cache covers, None for one that is not finished or does not exist.

    Raises UserError if it is damaged or its key is another.
    """
    path = folder / TEACHER_RECORD
    if not path.exists():
        return None
    record = read_record(path)
    refuse_newer(path, record.get("version"), VERSION)
    names = {"teacher": "the dense model", "text": "the text", "top_k": "recover.top_k"}
    names |= {"temperature": "recover.temperature", "vocabulary": "the vocabulary"}
    different = [name for field, name in names.items() if record.get(field) != asdict(key)[field]]
    if different:
        raise UserError(
            f"{folder}: holds the predictions for another recovery. What differs: {', '.join(different)}. Remove the "
            "directory, or choose another one with --teacher-cache."
        )
    covered: float | None = record["covered"]
    return covered


def missing_shards(folder: Path, key: CacheKey) -> list[int]:
    """Return the shards that are not on disk."""
    return [index for index in range(len(key.shards)) if not teacher_shard(folder, index).exists()]


def open_shard(folder: Path, key: CacheKey, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a shard, mapped from its file, and what it says about itself, after reading all of it.

    Raises UserError if it is damaged, missing, or belongs to another cache.
    """
    path = teacher_shard(folder, index)
    if not path.exists():
        raise UserError(f"{path}: missing. Run the recovery again to write it.")
    try:
        tensors, about = read_tensors(path), json.loads(metadata(path)[ABOUT])
        intact = about == with_checksum(about) and about["tensors"] == tensors_digest(tensors)
        if intact and (about["cache"], about["shard"]) == (key.digest, index):
            return tensors, about
    except (UserError, OSError, KeyError, ValueError):
        pass
    raise UserError(f"{path}: damaged, or of another cache. Remove this file and run the recovery again to write it.")
