"""Converts a checkpoint of pickled weights (pytorch_model*.bin), which pgprune does not read, to safetensors.

    python scripts/convert_to_safetensors.py SOURCE DIR

SOURCE is a hub name or a local directory. The pickles are read by torch's restricted unpickler, which runs no code, one
at a time, so that memory holds one of them. The lmsys Vicunas need this once.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

OTHERS = ("*.json", "*.jinja", "tokenizer*", "*.model", "LICENSE*", "NOTICE*")
PICKLES = "pytorch_model*.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert(source: str, target: Path) -> list[Path]:
    """Writes `target`, which must not exist; returns its weight files. Nothing is left of a conversion that fails."""
    if target.exists():
        sys.exit(f"{target}: exists already")
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[*OTHERS, PICKLES]))
    pickles = sorted(folder.glob(PICKLES))
    if not pickles:
        sys.exit(f"{source}: holds no {PICKLES}")
    part = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        written, places, size = [], {}, 0
        for number, pickle in enumerate(pickles, 1):
            name = "model.safetensors" if len(pickles) == 1 else f"model-{number:05}-of-{len(pickles):05}.safetensors"
            print(f"{pickle.name} → {name}", file=sys.stderr)
            state = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
            # safetensors refuses tensors that share memory, as tied ones do
            tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
            save_file(tensors, part / name, metadata={"format": "pt"})
            written.append(target / name)
            places |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if len(pickles) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for path in sorted({path for pattern in OTHERS for path in folder.glob(pattern)}):
            if path.name != PICKLE_INDEX:
                shutil.copyfile(path, part / path.name)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for file in convert(sys.argv[1], Path(sys.argv[2])):
        print(file)
