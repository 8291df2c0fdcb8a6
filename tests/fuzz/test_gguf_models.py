"""Models in GGUF files: any damage, counts and lengths beyond all bounds, other metadata, other tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.inputs import damaged, examples, put, tried
from helpers.models import TEXT, save_tokenizer, tiny_model
from helpers.readers import Changed, read_all
from hypothesis import given
from hypothesis import strategies as st

from pgprune_cli.jobs import export as job
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision

gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

LIST, STRING = 9, 8
SIZES = {"dense": (4, 24), "pruned": (2, 24)}
"""KV heads and FFN channels of every layer; of fewer than 24 the format would make 24 again."""
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def number(value: int, size: int = 8) -> bytes:
    return (value % (1 << 8 * size)).to_bytes(size, "little")


@dataclass(frozen=True)
class Entry:
    """A name of the metadata, the type of its value, and the value as it is in the file."""

    name: bytes
    kind: int
    value: bytes

    def bytes(self) -> bytes:
        return number(len(self.name)) + self.name + number(self.kind, 4) + self.value


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor; the shape as GGUF has it, the axis that moves fastest first."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    place: int
    axes: int | None = None

    def bytes(self) -> bytes:
        axes = len(self.shape) if self.axes is None else self.axes
        head = number(len(self.name)) + self.name + number(axes, 4) + b"".join(map(number, self.shape))
        return head + number(self.kind, 4) + number(self.place)


@dataclass(frozen=True)
class File:
    """A GGUF file in its parts. tensor_count, entry_count: what it says it has, where that is not the truth."""

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
            len(parts) if said is None else said
            for parts, said in ((self.tensors, self.tensor_count), (self.entries, self.entry_count))
        ]
        head = b"GGUF" + number(self.version, 4) + b"".join(map(number, counts))
        head += b"".join(part.bytes() for part in (*self.entries, *self.tensors))
        return head + bytes(-len(head) % 32) + self.data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model and one with half of it gone, by each of the formats' dtypes, and a text."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_model("llama-gqa").save_pretrained("base")
        save_tokenizer(Path("base"))
        for name, (groups, channels) in SIZES.items():
            keep = tuple(LayerMask(torch.arange(4) < groups, torch.arange(24) < channels) for _ in range(4))
            fingerprint = resolve("base").fingerprint()
            Decision(keep, "base", fingerprint, 0.5, "dtype: float32\n", 1, 2, 3, 2.5).save(Path("made"))
            for dtype in DTYPES:
                options = job.options_of("gguf", dtype=dtype)
                job.export(Path("made"), Path(f"{name}-{dtype}.gguf"), format="gguf", options=options)
    put(folder / "text.txt", TEXT.encode() * 9)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> File:
    return File.read(folder / "dense-float32.gguf")


def read(folder: Path, content: bytes, kind: str) -> None:
    with Changed(folder / "x.gguf", content):
        read_all(folder / "x.gguf", kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_files_are_whole(size: str, dtype: str, folder: Path) -> None:
    groups, channels = SIZES[size]
    name = f"{size}-{dtype}"
    keep = tuple(LayerMask(torch.arange(groups) < 1, torch.arange(channels) < 9) for _ in range(4))
    read_all(folder / f"{name}.gguf", f"gguf, whole {name}", keep)
    assert [tried[f"gguf, whole {name}{reader}, refused"] for reader in ("", ", doctor", ", export")] == [0, 0, 0]


def test_what_is_taken_apart_is_put_together(folder: Path, whole: File) -> None:
    assert whole.bytes() == (folder / "dense-float32.gguf").read_bytes()


@examples(10)
@given(data=st.data())
def test_any_damage(folder: Path, whole: File, data) -> None:
    content = whole.bytes()
    head = content[: -len(whole.data)]  # a flipped bit of a weight is another weight
    broken = data.draw(st.one_of(damaged(head).map(lambda found: found + whole.data), damaged(content)))
    read(folder, broken, "gguf, damaged")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(99), b"\xff" * 999, b"GGUF\3\0\0\0" + b"\xff" * 999])
def test_no_such_thing(content: bytes, folder: Path) -> None:
    read(folder, content, "gguf, nonsense")


BEYOND = st.sampled_from([0, 1, 2, 5, 255, 2**16, 2**20, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1])


@examples(15)
@given(data=st.data())
def test_counts_and_lengths_beyond_all_bounds(folder: Path, whole: File, data) -> None:
    many = data.draw(BEYOND)
    place = data.draw(st.integers(0, len(whole.entries) - 1))
    entry = whole.entries[place]
    match data.draw(st.sampled_from(["tensors", "entries", "value", "list", "name", "list of lists"])):
        case "tensors":
            changed = replace(whole, tensor_count=many)
        case "entries":
            changed = replace(whole, entry_count=many)
        case "value":  # of a text its length, of a list its type
            changed = put_entry(whole, place, replace(entry, value=number(many) + entry.value[8:]))
        case "list":
            kind = data.draw(st.integers(0, 13))
            changed = put_entry(whole, place, replace(entry, kind=LIST, value=number(kind, 4) + number(many)))
        case "name":
            changed = put_entry(whole, place, replace(entry, name=b"x" * min(many, 2**20)))
        case "list of lists":
            depth = min(many, 10**5)
            value = (number(LIST, 4) + number(1)) * depth + number(4, 4) + number(0)
            changed = put_entry(whole, place, replace(entry, kind=LIST, value=value))
    read(folder, changed.bytes(), "gguf, counts")


def put_entry(file: File, place: int, *entries: Entry) -> File:
    return replace(file, entries=(*file.entries[:place], *entries, *file.entries[place + 1 :]))


NUMBERS = st.one_of(BEYOND.map(number), st.floats(width=64).map(lambda value: number(hash(value)))).map(bytes)
TEXTS = st.one_of(st.text(max_size=9).map(str.encode), st.binary(max_size=9), st.just(b"{{ 1/0 }}"))
LISTS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(
    lambda values: number(4, 4) + number(len(values)) + b"".join(number(value, 4) for value in values)
)
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@examples(15)
@given(data=st.data())
def test_other_metadata(folder: Path, whole: File, data) -> None:
    place = data.draw(st.integers(0, len(whole.entries) - 1))
    entry = whole.entries[place]
    match data.draw(st.sampled_from(["number", "type", "text", "list", "gone", "twice", "renamed", "swapped"])):
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
        case "gone":
            changed = []
        case "twice":
            changed = [entry, entry]
        case "renamed":
            changed = [replace(entry, name=data.draw(TEXTS))]
        case "swapped":
            other = data.draw(st.sampled_from(whole.entries))
            changed = [replace(entry, kind=other.kind, value=other.value)]
    read(folder, put_entry(whole, place, *changed).bytes(), "gguf, metadata")


ARCHITECTURES = ("", "mistral", "qwen2", "qwen3", "qwen2moe", "deci", "gpt2", "mamba", "gemma2", "falcon", "lfm2", "t5")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_architecture(architecture: str, folder: Path, whole: File) -> None:
    new = architecture.encode()
    entries = []
    for entry in whole.entries:
        if entry.name == b"general.architecture":
            entry = replace(entry, value=number(len(new)) + new)
        elif entry.name.startswith(b"llama."):
            entry = replace(entry, name=entry.name.replace(b"llama", new, 1))
        entries.append(entry)
    read(folder, replace(whole, entries=tuple(entries)).bytes(), "gguf, architectures")


@examples(15)
@given(data=st.data())
def test_other_tensors(folder: Path, whole: File, data) -> None:
    place = data.draw(st.integers(0, len(whole.tensors) - 1))
    tensor = whole.tensors[place]
    match data.draw(st.sampled_from(["shape", "axes", "type", "place", "name", "gone", "twice", "turned", "nan"])):
        case "shape":
            shape = tuple(data.draw(st.lists(st.one_of(BEYOND, st.integers(1, 64)), min_size=1, max_size=5)))
            changed = [replace(tensor, shape=shape)]
        case "axes":
            changed = [replace(tensor, axes=data.draw(BEYOND))]
        case "type":
            changed = [replace(tensor, kind=data.draw(st.integers(0, 45)))]
        case "place":
            changed = [replace(tensor, place=data.draw(BEYOND))]
        case "name":
            names = [b"", b"x", b"blk.99.attn_q.weight", b"\xff\xfe", whole.tensors[0].name]
            changed = [replace(tensor, name=data.draw(st.sampled_from(names)))]
        case "gone":
            changed = []
        case "twice":
            changed = [tensor, tensor]
        case "turned":
            changed = [replace(tensor, shape=tensor.shape[::-1])]
        case "nan":
            changed = [tensor]
            whole = replace(whole, data=whole.data[: tensor.place] + b"\xff" * 4 + whole.data[tensor.place + 4 :])
    tensors = (*whole.tensors[:place], *changed, *whole.tensors[place + 1 :])
    read(folder, replace(whole, tensors=tensors).bytes(), "gguf, tensors")
