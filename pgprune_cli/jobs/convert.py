"""convert: pickled weights (pytorch_model*.bin), which no other command reads, written anew as safetensors.

torch's restricted unpickler reads the pickles and runs no code in them. They are mapped into memory one at a time, and
no more than one tensor is copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.errors import UserError, in_short
from pgprune_cli.export.plan import DISK_RESERVE, check_new, check_space
from pgprune_cli.model.names import is_hub_name
from pgprune_cli.model.source import INDEX, download
from pgprune_cli.storage.atomic import new_directory
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.safetensors_file import NAMES, write_tensors

COPIED = ("*.json", "*.jinja", "tokenizer*", "*.model", "LICENSE*", "NOTICE*")
PICKLES = "pytorch_model*.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert(source: str, out: Path, *, progress: Progress = SILENT) -> list[Path]:
    """Write a model with pickled weights into the new directory `out` as safetensors. Return its weight files.

    source: a directory, or a name on the hub. If the conversion fails, nothing is left.

    Raises:
        UserError: `source` has no pickled weights, or some that need code to be read or are no tensors; `out` is not
            empty.
        RunError: there is too little room on the disk.
        OSError: `out` cannot be written.
    """
    out = expanded(out)
    check_new(out, directory=True)
    folder = expanded(source)
    if not folder.is_dir():
        if not is_hub_name(source):
            raise UserError(f"{source}: no such directory, and not a hub name (owner/name) either. Check the spelling.")
        with progress.working(f"fetching {source}"):
            folder = download(source, [*COPIED, PICKLES])
    pickles = sorted(folder.glob(PICKLES))
    if not pickles:
        raise UserError(f"{source}: holds no {PICKLES}. Only models with pickled weights have to be converted.")
    check_space(out.resolve(), sum(path.stat().st_size for path in pickles) + DISK_RESERVE)
    with new_directory(out.resolve()) as temporary:  # a link to an empty directory cannot be replaced
        names = _convert_weights(pickles, temporary, progress)
        for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
            if path.name not in (PICKLE_INDEX, INDEX):  # both list the files of the original
                shutil.copyfile(path, temporary / path.name)
    return [out / name for name in names]


def _convert_weights(pickles: Sequence[Path], folder: Path, progress: Progress) -> list[str]:
    """Write one safetensors file into `folder` for every pickle, with an index if there are several. Return names."""
    names: list[str] = []
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, pickled in enumerate(pickles, 1):
        name = "model.safetensors" if len(pickles) == 1 else f"model-{number:05}-of-{len(pickles):05}.safetensors"
        with progress.working(f"{pickled.name} → {name}"):
            sizes = _convert_file(pickled, folder / name)
        names.append(name)
        weight_map |= dict.fromkeys(sizes, name)
        total_size += sum(sizes.values())
    if len(pickles) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return names


def _convert_file(pickled: Path, path: Path) -> dict[str, int]:
    """Write the tensors of a pickle to a safetensors file. Return their sizes in bytes by name."""
    import torch

    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # code in it, a truncated file, a format older than zip
        raise UserError(
            f"{pickled}: cannot be read without running code in it, or is damaged ({in_short(error, 200)}). "
            "Fetch the model's files again, or use another copy of the model."
        ) from error
    _refuse_other_values(pickled, state)
    write_tensors(path, {name: tensor.detach() for name, tensor in state.items()})
    return {name: tensor.nbytes for name, tensor in state.items()}


def _refuse_other_values(pickled: Path, state: Any) -> None:
    """Raise UserError unless a pickle holds tensors by name, as torch.save(model.state_dict()) writes them."""
    from torch import Tensor, strided

    others = [f"of type {type(state).__name__}"]
    if isinstance(state, dict):
        named = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        others = [f"{key}, of type {type(value).__name__}" for key, value in named.items()]
    if others:
        raise UserError(
            f"{pickled}: holds something other than tensors by name ({others[0]}). "
            "Save the weights alone: torch.save(model.state_dict(), 'pytorch_model.bin')"
        )
    for key, tensor in state.items():
        if tensor.dtype not in NAMES or tensor.layout != strided:
            raise UserError(
                f"{pickled}: {key} is a {tensor.layout} tensor of {tensor.dtype}, which cannot be converted. "
                "Save it as an ordinary tensor of floats or integers."
            )
