"""Write the predictions of a dense model to disk, one forward pass at a time, and resume where writing stopped."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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
    digest_of,
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
from pgprune_cli.storage.records import with_checksum, write_record


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
        with ExitStack() as until_written:
            if ranks.is_writer:
                until_written.enter_context(locked(folder))
                _begin(folder, key)
            ranks.barrier()
            _write_shards(folder, key, text, load, batch, ranks, stop, progress)
            ranks.barrier()
            if ranks.is_writer:
                write_record(folder / TEACHER_RECORD, record_of(key, _covered(folder, key)))
        ranks.barrier()
    teacher = CachedTeacher(folder, key)
    size = key.bytes_of(key.shards)
    progress.say(
        f"{folder}: the dense model's {key.top_k} most likely tokens of every position, {size / 1e9:,.2f} GB. They "
        f"cover {teacher.covered:.2%} of the probability."
    )
    return teacher


def _begin(folder: Path, key: CacheKey) -> None:
    """Write the record of an unfinished cache. Raise RunError if the shards that are missing do not fit on the disk."""
    needed = key.bytes_of([key.shards[index] for index in missing_shards(folder, key)])
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder}: the dense model's predictions need {needed / 1e9:,.2f} GB here, but only {free / 1e9:,.2f} GB "
            "are free. Free some space, set recover.top_k or recover.tokens lower, or choose another directory with "
            "--teacher-cache."
        )
    write_record(folder / TEACHER_RECORD, record_of(key, None))


def _covered(folder: Path, key: CacheKey) -> float:
    """Return the mean probability that the shards cover, over the positions that are trained on."""
    parts = [open_shard(folder, key, index)[1] for index in range(len(key.shards))]
    return float(sum(part["covered"] for part in parts) / max(1, sum(part["positions"] for part in parts)))


def _write_shards(
    folder: Path,
    key: CacheKey,
    text: RecoveryText,
    load: Callable[[], LiveTeacher],
    batch: int,
    ranks: Ranks,
    stop: Sequence[int],
    progress: Progress,
) -> None:
    """Write this process's share of the missing shards. The model is loaded before the first and dropped at the end."""
    missing = sorted(set(ranks.share(len(key.shards))).intersection(missing_shards(folder, key)))
    if not missing:
        return
    teacher = load()
    total = key.bytes_of([key.shards[index] for index in missing])
    with progress.writing("writing the dense model's predictions", total) as advance:
        for index in missing:
            parts = []
            for part in _predicted(teacher, text, key, key.shards[index], batch):
                if stop:
                    raise Interrupted(stop[0], 0)
                parts.append(part)
                advance(len(part[LOG_PROBS]) * key.window_bytes)
            write_bytes(teacher_shard(folder, index), _shard(key, index, text, parts))
    del teacher
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _predicted(
    teacher: LiveTeacher, text: RecoveryText, key: CacheKey, windows: range, batch: int
) -> Iterator[dict[str, Tensor]]:
    """Yield what is stored of batches of windows, on the CPU. Raises RunError if the model predicts NaN."""
    for start in range(windows.start, windows.stop, batch):
        rows = torch.arange(start, min(start + batch, windows.stop))
        targets = teacher.targets(text.windows[rows], rows)
        if targets.log_probs.isnan().any():
            raise RunError("the dense model predicts NaN, so nothing can be trained towards it. Fetch its files again.")
        stored = {LOG_PROBS: targets.log_probs.half().cpu()}
        if targets.tokens is not None and key.token_dtype is not None:
            stored[TOKENS] = targets.tokens.cpu().to(key.token_dtype)
        yield stored


def _shard(key: CacheKey, index: int, text: RecoveryText, parts: Sequence[dict[str, Tensor]]) -> bytes:
    """Return the content of a shard's file."""
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    covered = tensors[LOG_PROBS].double().exp().sum(-1)
    if text.trained is not None:
        covered = covered[text.trained[key.shards[index].start : key.shards[index].stop]]
    about = {"cache": key.digest, "shard": index, "tensors": digest_of(tensors)}
    about |= {"covered": float(covered.clamp(max=1.0).sum()), "positions": covered.numel()}
    return save(tensors, metadata={ABOUT: json.dumps(with_checksum(about))})
