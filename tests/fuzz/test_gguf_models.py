"""GGUF models with damage, huge counts, other metadata or other tensors, given to everything that reads models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.inputs import damaged, examples, tried, write
from helpers.masks import keep_first
from helpers.models import TEXT, save_tokenizer, tiny_model
from helpers.readers import Changed, read_everything
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.core.grid import Grid, first_elements
from pgprune_cli.jobs import export as export_job
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

LIST, STRING = 9, 8
SIZES = {"dense": (4, 24), "pruned": (2, 24)}
"""KV heads and FFN channels of every layer. The format pads fewer than 24 channels to 24 again."""
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def number(value: int, size: int = 8) -> bytes:
    return (value % (1 << 8 * size)).to_bytes(size, "little")


@dataclass(frozen=True)
class Entry:
    """An entry of the metadata: its name, the type of its value, and the bytes of the value."""

    name: bytes
    kind: int
    value: bytes

    def bytes(self) -> bytes:
        return number(len(self.name)) + self.name + number(self.kind, 4) + self.value


@dataclass(frozen=True)
class Tensor:
    """What the header says about a tensor. shape: in GGUF order, the fastest axis first; axes: how many it claims."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int
    axes: int | None = None

    def bytes(self) -> bytes:
        axes = len(self.shape) if self.axes is None else self.axes
        head = number(len(self.name)) + self.name + number(axes, 4) + b"".join(map(number, self.shape))
        return head + number(self.kind, 4) + number(self.offset)


@dataclass(frozen=True)
class File:
    """The parts of a GGUF file. tensor_count, entry_count: what the header claims, if that is not the truth."""

    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]
    data: bytes
    version: int = 3
    tensor_count: int | None = None
    entry_count: int | None = None

    @classmethod
    def read(cls, path: Path) -> File:
        reader = gguf.GGUFReader(path)
        own = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
        entries = [Entry(x.parts[1].tobytes(), int(x.parts[2][0]), b"".join(map(bytes, x.parts[3:]))) for x in own]
        tensors = [
            Tensor(t.name.encode(), tuple(map(int, t.shape)), int(t.tensor_type), t.data_offset - reader.data_offset)
            for t in reader.tensors
        ]
        return cls(tuple(entries), tuple(tensors), path.read_bytes()[reader.data_offset :])

    def bytes(self) -> bytes:
        counts = [
            len(parts) if claimed is None else claimed
            for parts, claimed in ((self.tensors, self.tensor_count), (self.entries, self.entry_count))
        ]
        head = b"GGUF" + number(self.version, 4) + b"".join(map(number, counts))
        head += b"".join(part.bytes() for part in (*self.entries, *self.tensors))
        return head + bytes(-len(head) % 32) + self.data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and one with half of its KV heads, in every dtype of the format, and a text."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = tiny_model("llama-gqa")
        model.save_pretrained("base")
        save_tokenizer(Path("base"))
        for name, size in SIZES.items():
            model_mask = keep_first(model, [size] * 4)
            fingerprint = resolve("base").fingerprint()
            Decision(model_mask, "base", fingerprint, 0.5, "dtype: float32\n", 1, 2, 3, 2.5).save(Path("made"))
            for dtype in DTYPES:
                options = export_job.options_of("gguf", dtype=dtype)
                export_job.export(Path("made"), Path(f"{name}-{dtype}.gguf"), format="gguf", options=options)
    write(folder / "text.txt", TEXT.encode() * 9)
    return folder


@pytest.fixture(scope="module")
def intact(folder: Path) -> File:
    return File.read(folder / "dense-float32.gguf")


def read(folder: Path, content: bytes, kind: str) -> None:
    with Changed(folder / "x.gguf", content):
        read_everything(folder / "x.gguf", kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_unchanged_files_are_accepted(size: str, dtype: str, folder: Path) -> None:
    kv_heads, channels = SIZES[size]
    name = f"{size}-{dtype}"
    model_mask = tuple(LayerMask(first_elements(Grid(kv_heads, 2), 1, 2), torch.arange(channels) < 9) for _ in range(4))
    read_everything(folder / f"{name}.gguf", f"gguf, unchanged {name}", model_mask)
    assert [tried[f"gguf, unchanged {name}{reader}, refused"] for reader in ("", ", doctor", ", export")] == [0, 0, 0]


def test_a_file_is_put_together_from_its_parts(folder: Path, intact: File) -> None:
    assert intact.bytes() == (folder / "dense-float32.gguf").read_bytes()


@examples(10)
@given(data=st.data())
def test_a_damaged_file_is_accepted_or_refused(folder: Path, intact: File, data) -> None:
    content = intact.bytes()
    head = content[: -len(intact.data)]  # a flipped bit of a weight would only be another weight
    broken = data.draw(st.one_of(damaged(head).map(lambda header: header + intact.data), damaged(content)))
    read(folder, broken, "gguf, damaged")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(99), b"\xff" * 999, b"GGUF\3\0\0\0" + b"\xff" * 999])
def test_a_file_of_nonsense_is_accepted_or_refused(content: bytes, folder: Path) -> None:
    read(folder, content, "gguf, nonsense")


HUGE = st.sampled_from([0, 1, 2, 5, 255, 2**16, 2**20, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1])


@examples(15)
@given(data=st.data())
def test_huge_counts_and_lengths_are_accepted_or_refused(folder: Path, intact: File, data) -> None:
    claimed_number = data.draw(HUGE)
    position = data.draw(st.integers(0, len(intact.entries) - 1))
    entry = intact.entries[position]
    match data.draw(st.sampled_from(["tensors", "entries", "value", "list", "name", "list of lists"])):
        case "tensors":
            changed = replace(intact, tensor_count=claimed_number)
        case "entries":
            changed = replace(intact, entry_count=claimed_number)
        case "value":  # the length of a text, or the type of a list
            changed = with_entries(intact, position, replace(entry, value=number(claimed_number) + entry.value[8:]))
        case "list":
            kind = data.draw(st.integers(0, 13))
            changed = with_entries(
                intact, position, replace(entry, kind=LIST, value=number(kind, 4) + number(claimed_number))
            )
        case "name":
            changed = with_entries(intact, position, replace(entry, name=b"x" * min(claimed_number, 2**20)))
        case "list of lists":
            depth = min(claimed_number, 10**5)
            value = (number(LIST, 4) + number(1)) * depth + number(4, 4) + number(0)
            changed = with_entries(intact, position, replace(entry, kind=LIST, value=value))
    read(folder, changed.bytes(), "gguf, counts")


def with_entries(file: File, position: int, *entries: Entry) -> File:
    """Return the file with these entries in place of the one at `position`."""
    return replace(file, entries=(*file.entries[:position], *entries, *file.entries[position + 1 :]))


NUMBERS = st.one_of(HUGE.map(number), st.floats(width=64).map(lambda value: number(hash(value)))).map(bytes)
TEXTS = st.one_of(st.text(max_size=9).map(str.encode), st.binary(max_size=9), st.just(b"{{ 1/0 }}"))
LISTS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(
    lambda values: number(4, 4) + number(len(values)) + b"".join(number(value, 4) for value in values)
)
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@examples(15)
@given(data=st.data())
def test_other_metadata_is_accepted_or_refused(folder: Path, intact: File, data) -> None:
    position = data.draw(st.integers(0, len(intact.entries) - 1))
    entry = intact.entries[position]
    match data.draw(st.sampled_from(["number", "type", "text", "list", "removed", "repeated", "renamed", "swapped"])):
        case "number" if entry.kind in BYTES:
            changed = [replace(entry, value=data.draw(NUMBERS)[: BYTES[entry.kind]])]
        case "number" | "type":
            kind = data.draw(st.sampled_from(sorted(BYTES)))
            changed = [replace(entry, kind=kind, value=data.draw(NUMBERS)[: BYTES[kind]])]
        case "text":
            text = data.draw(TEXTS)
            changed = [replace(entry, kind=STRING, value=number(len(text)) + text)]
        case "list":
            changed = [replace(entry, kind=LIST, value=data.draw(LISTS))]
        case "removed":
            changed = []
        case "repeated":
            changed = [entry, entry]
        case "renamed":
            changed = [replace(entry, name=data.draw(TEXTS))]
        case "swapped":
            other = data.draw(st.sampled_from(intact.entries))
            changed = [replace(entry, kind=other.kind, value=other.value)]
    read(folder, with_entries(intact, position, *changed).bytes(), "gguf, metadata")


ARCHITECTURES = ("", "mistral", "qwen2", "qwen3", "qwen2moe", "deci", "gpt2", "mamba", "gemma2", "falcon", "lfm2", "t5")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_architecture_is_accepted_or_refused(architecture: str, folder: Path, intact: File) -> None:
    new = architecture.encode()
    entries = []
    for entry in intact.entries:
        if entry.name == b"general.architecture":
            entry = replace(entry, value=number(len(new)) + new)
        elif entry.name.startswith(b"llama."):
            entry = replace(entry, name=entry.name.replace(b"llama", new, 1))
        entries.append(entry)
    read(folder, replace(intact, entries=tuple(entries)).bytes(), "gguf, architectures")


@examples(15)
@given(data=st.data())
def test_other_tensors_are_accepted_or_refused(folder: Path, intact: File, data) -> None:
    position = data.draw(st.integers(0, len(intact.tensors) - 1))
    tensor = intact.tensors[position]
    match data.draw(
        st.sampled_from(["shape", "axes", "type", "offset", "name", "removed", "repeated", "transposed", "nan"])
    ):
        case "shape":
            shape = tuple(data.draw(st.lists(st.one_of(HUGE, st.integers(1, 64)), min_size=1, max_size=5)))
            changed = [replace(tensor, shape=shape)]
        case "axes":
            changed = [replace(tensor, axes=data.draw(HUGE))]
        case "type":
            changed = [replace(tensor, kind=data.draw(st.integers(0, 45)))]
        case "offset":
            changed = [replace(tensor, offset=data.draw(HUGE))]
        case "name":
            names = [b"", b"x", b"blk.99.attn_q.weight", b"\xff\xfe", intact.tensors[0].name]
            changed = [replace(tensor, name=data.draw(st.sampled_from(names)))]
        case "removed":
            changed = []
        case "repeated":
            changed = [tensor, tensor]
        case "transposed":
            changed = [replace(tensor, shape=tensor.shape[::-1])]
        case "nan":
            changed = [tensor]
            intact = replace(intact, data=intact.data[: tensor.offset] + b"\xff" * 4 + intact.data[tensor.offset + 4 :])
    tensors = (*intact.tensors[:position], *changed, *intact.tensors[position + 1 :])
    read(folder, replace(intact, tensors=tensors).bytes(), "gguf, tensors")
