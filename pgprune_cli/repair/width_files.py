"""The width table on disk, one file per layer, in the run directory until the search is finished.

The repaired projections of all widths are larger than the model. They are mapped into memory and only read, so the
processes of one machine share a single copy, and the system drops what memory has no room for. A file is whole or
absent. A layer whose file is whole and belongs to the same search is not solved again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.repair.width_table import BlockWidths
from pgprune_cli.run.layout import WIDTHS_FOLDER, widths_file
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import metadata, read_tensors, tensors_digest, with_checksum

ABOUT = "pgprune"
ERRORS, ORDER = "errors", "order"


def save_layer(run: Path, index: int, blocks: Mapping[str, BlockWidths], identity: str) -> None:
    """Write one layer's widths, block by block, for the search that `identity` stands for. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    for name, block in blocks.items():
        tensors |= {f"{name}.{ERRORS}": block.errors, f"{name}.{ORDER}": block.order}
        tensors |= {f"{name}.{kept}": weight for kept, weight in block.weights.items()}
    about = with_checksum({"identity": identity, "tensors_sha256": tensors_digest(tensors)})
    write_bytes(widths_file(run, index), save(tensors, metadata={ABOUT: json.dumps(about)}))


def save_layers(
    run: Path, layers: Iterable[tuple[int, Mapping[str, BlockWidths]]], identity: str, solved: Callable[[], None]
) -> None:
    """Write layers as `save_layer` does, each while the next one is solved, and call `solved` after each of them.

    At most one layer waits for the disk. A file that cannot be written stops the next layer. Raises OSError.
    """
    with ThreadPoolExecutor(max_workers=1) as worker:
        writing: Future[None] | None = None
        for index, blocks in layers:
            if writing is not None:
                writing.result()
            writing = worker.submit(save_layer, run, index, blocks, identity)
            solved()
        if writing is not None:
            writing.result()


def has_layer(run: Path, index: int, identity: str) -> bool:
    """Return whether a layer's file exists, is whole and belongs to this search. Reads all of it."""
    path = widths_file(run, index)
    if not path.exists():
        return False
    try:
        tensors, about = read_tensors(path), json.loads(metadata(path)[ABOUT])
    except (UserError, KeyError, ValueError):
        return False
    return bool(about == with_checksum({"identity": identity, "tensors_sha256": tensors_digest(tensors)}))


def load_layer(run: Path, index: int) -> dict[str, BlockWidths]:
    """Return one layer's widths by block name. The tensors are on the CPU, mapped from the file.

    Raises UserError for a file that is missing or truncated.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for name, tensor in read_tensors(widths_file(run, index)).items():
        block, _, key = name.rpartition(".")
        blocks.setdefault(block, {})[key] = tensor
    return {
        name: BlockWidths(
            parts.pop(ERRORS), parts.pop(ORDER), {int(kept): parts[kept] for kept in sorted(parts, key=int)}
        )
        for name, parts in blocks.items()
    }


def refuse_full_disk(run: Path, layers: int, needed: int) -> None:
    """Raise RunError if `needed` bytes, the files of all `layers`, do not fit on the disk besides those that exist."""
    missing = needed * sum(not widths_file(run, index).exists() for index in range(layers)) // layers
    free = shutil.disk_usage(run).free
    if missing > free:
        raise RunError(
            f"{run / WIDTHS_FOLDER}: the width table needs {missing / 1e9:.1f} GB here while the search runs, but only "
            f"{free / 1e9:.1f} GB are free. Make room, or choose another directory with --out."
        )


def remove_widths(run: Path) -> None:
    """Remove the files of all layers, once the search is finished. Raises OSError."""
    folder = run / WIDTHS_FOLDER
    if folder.exists():
        for path in list(folder.iterdir()):
            path.unlink()
        with suppress(OSError):  # on NFS, a file that is still mapped keeps a name until its process ends
            folder.rmdir()
