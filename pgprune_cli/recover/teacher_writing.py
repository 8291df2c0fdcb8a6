"""Write the predictions of a dense model to disk, one forward pass at a time, and resume where writing stopped."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError
from pgprune_cli.recover.teacher import LiveTeacher
from pgprune_cli.recover.teacher_cache import (
    ABOUT,
    LOG_PROBS,
    TOKENS,
    CachedTeacher,
    CacheKey,
    missing_shards,
    open_shard,
    read_covered,
    record_of,
)
from pgprune_cli.recover.texts import RecoveryText
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import TEACHER_RECORD, teacher_shard
from pgprune_cli.run.lock import locked
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import tensors_digest, with_checksum, write_record


def cached_teacher(
    folder: Path,
    key: CacheKey,
    text: RecoveryText,
    load: Callable[[], LiveTeacher],
    *,
    batch: int,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    stop: Sequence[int] = (),
    progress: Progress = SILENT,
) -> CachedTeacher:
    """Return the predictions in `folder`, after writing what is missing of them. Tells how much they cover.

    load: returns the dense model for the key's text, k and temperature. It is called only if something is missing, and
    its model is out of memory afterwards; batch: windows per forward pass; ranks: of the processes under torchrun, each
    of which writes its share of the shards; stop: holds a signal once one asks to stop.

    Raises:
        UserError: the folder holds other predictions, is damaged, or another process writes them.
        RunError: the disk has no room for them, or the dense model predicts NaN.
        Interrupted: a signal came. Shards that are complete are kept.
    """
    if read_covered(folder, key) is None or missing_shards(folder, key):
        writer = _Writer(folder, key, text, batch, stop)
        with ExitStack() as until_written:
            if ranks.is_writer:
                until_written.enter_context(locked(folder))
                writer.begin()
            ranks.barrier()
            writer.write(load, ranks, progress)
            if stop_signal := ranks.max(stop[0] if stop else 0):  # one that another process got counts, too
                raise Interrupted(stop_signal, 0)
            if ranks.is_writer:
                writer.finish()
        ranks.barrier()
    teacher = CachedTeacher(folder, key)
    size = key.bytes_of(key.shards) / 1e6
    progress.say(
        f"{folder}: the dense model's {key.top_k} most likely tokens of every position, {size:,.0f} MB. They cover "
        f"{teacher.covered:.2%} of the probability."
    )
    return teacher


@dataclass(frozen=True)
class _Writer:
    """Writes the shards of a cache. The attributes are the arguments of `cached_teacher`."""

    folder: Path
    key: CacheKey
    text: RecoveryText
    batch: int
    stop: Sequence[int]

    def begin(self) -> None:
        """Write the record of an unfinished cache. Raise RunError if the missing shards do not fit on the disk."""
        missing = [self.key.shards[index] for index in missing_shards(self.folder, self.key)]
        needed, free = self.key.bytes_of(missing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise RunError(
                f"{self.folder}: the dense model's predictions need {needed / 1e9:,.2f} GB here, but only "
                f"{free / 1e9:,.2f} GB are free. Make room, set recover.top_k or recover.tokens lower, or choose "
                "another directory with --teacher-cache."
            )
        write_record(self.folder / TEACHER_RECORD, record_of(self.key, None))

    def write(self, load: Callable[[], LiveTeacher], ranks: Ranks, progress: Progress) -> None:
        """Write this process's share of the missing shards, until a signal asks to stop. Loads the model for that."""
        key = self.key
        missing = [index for index in missing_shards(self.folder, key) if index in ranks.share(len(key.shards))]
        if not missing:
            return
        teacher, total = load(), key.bytes_of([key.shards[index] for index in missing])
        with progress.writing("writing the dense model's predictions", total) as advance:
            for index in missing:
                parts = []
                for part in self._predictions(teacher, key.shards[index]):
                    if self.stop:
                        return
                    parts.append(part)
                    advance(len(part[LOG_PROBS]) * key.window_bytes)
                write_bytes(teacher_shard(self.folder, index), self._shard(index, parts))
        del teacher
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def finish(self) -> None:
        """Write the record of a finished cache, with the mean probability it covers at the positions trained on."""
        parts = [open_shard(self.folder, self.key, index)[1] for index in range(len(self.key.shards))]
        covered = sum(part["covered"] for part in parts) / max(1, sum(part["positions"] for part in parts))
        write_record(self.folder / TEACHER_RECORD, record_of(self.key, covered))

    def _predictions(self, teacher: LiveTeacher, windows: range) -> Iterator[dict[str, Tensor]]:
        """Yield what is stored of batches of windows, on the CPU. Raises RunError if the model predicts NaN."""
        for start in range(windows.start, windows.stop, self.batch):
            rows = torch.arange(start, min(start + self.batch, windows.stop))
            targets = teacher.targets(self.text.windows[rows], rows)
            if targets.log_probs.isnan().any():
                raise RunError("the dense model predicts NaN, so nothing can learn from it. Fetch its files again.")
            least = torch.finfo(torch.float16).min  # an infinite one would make the loss NaN
            stored = {LOG_PROBS: targets.log_probs.clamp(min=least).half().cpu()}
            if targets.tokens is not None and self.key.token_dtype is not None:
                stored[TOKENS] = targets.tokens.cpu().to(self.key.token_dtype)
            yield stored

    def _shard(self, index: int, parts: Sequence[dict[str, Tensor]]) -> bytes:
        """Return the content of a shard's file."""
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        covered = tensors[LOG_PROBS].double().exp().sum(-1)
        if self.text.trained is not None:
            windows = self.key.shards[index]
            covered = covered[self.text.trained[windows.start : windows.stop]]
        about = {"cache": self.key.digest, "shard": index, "tensors": tensors_digest(tensors)}
        about |= {"covered": float(covered.clamp(max=1.0).sum()), "positions": covered.numel()}
        return save(tensors, metadata={ABOUT: json.dumps(with_checksum(about))})
