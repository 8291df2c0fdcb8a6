"""Convert a checkpoint of pickled weights (pytorch_model*.bin), which pgprune does not read, to safetensors.

    python scripts/convert_to_safetensors.py SOURCE DIR

SOURCE is a hub name or a local directory. torch's restricted unpickler reads the pickles and runs no code in them. It
reads one file at a time, so memory holds only one. The lmsys Vicunas need this once.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

COPIED = ("*.json", "*.jinja", "tokenizer*", "*.model", "LICENSE*", "NOTICE*")
PICKLES = "pytorch_model*.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert(source: str, target: Path) -> list[Path]:
    """Convert a checkpoint into the directory `target`, which must not exist, and return its weight files.

    If the conversion fails, nothing is left. Exits with a message if `target` exists or if there are no pickles.
    """
    if target.exists():
        sys.exit(f"{target}: already exists. Remove it or choose another directory.")
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[*COPIED, PICKLES]))
    pickles = sorted(folder.glob(PICKLES))
    if not pickles:
        sys.exit(f"{source}: no {PICKLES} in it.")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        names = convert_weights(pickles, temporary)
        for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
            if path.name != PICKLE_INDEX:
                shutil.copyfile(path, temporary / path.name)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [target / name for name in names]


def convert_weights(pickles: Sequence[Path], folder: Path) -> list[str]:
    """Write one safetensors file into `folder` for every pickle, with an index if there are several. Returns names."""
    names, weight_map, total_size = [], {}, 0
    for number, pickle in enumerate(pickles, 1):
        name = "model.safetensors" if len(pickles) == 1 else f"model-{number:05}-of-{len(pickles):05}.safetensors"
        print(f"{pickle.name} → {name}", file=sys.stderr)
        state = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
        # safetensors refuses tensors that share memory, as tied ones do
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        names.append(name)
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(pickles) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return names


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for file in convert(sys.argv[1], Path(sys.argv[2])):
        print(file)
