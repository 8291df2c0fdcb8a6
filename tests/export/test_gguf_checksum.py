"""GGUF exports that another tool has rewritten: `verify` says what the tool did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.exports import decide
from helpers.messages import refused, says
from helpers.models import save_tokenizer, tiny_model

from pgprune_cli.export import gguf as writer
from pgprune_cli.export.plan import Options
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import resolve

gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in float32."""
    import torch

    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama-gqa")
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    heads, channels = model.config.num_attention_heads, model.config.intermediate_size
    kept = LayerMask(torch.ones(heads, dtype=torch.bool), torch.ones(channels, dtype=torch.bool))
    decision = decide(folder / "base", (kept,) * model.config.num_hidden_layers)
    writer.plan(resolve(str(folder / "base")), decision, Options(dtype="float32")).write(
        folder / "small.gguf", lambda _: None
    )
    return folder / "small.gguf"


def rewrite(source: Path, out: Path, kind: str | None = None, parts: int = 1, **changed: str) -> Path:
    """Write a GGUF file anew as llama.cpp's tools do: all keys are kept, but for those that the tool sets.

    kind: quantize matrices to this type; parts: split the file into this many and keep the first; changed: keys to
    replace, with `__` for dots.
    """
    reader = gguf.GGUFReader(source)
    new = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    replaced = {key.replace("__", "."): value for key, value in changed.items()}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or field.name in replaced:
            continue
        value, types = field.contents(), field.types
        if field.name == "general.file_type" and kind is not None:
            value = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        new.add_key_value(field.name, value, types[0], types[-1] if len(types) > 1 else None)
    for key, value in replaced.items():
        new.add_string(key, value)
    if parts > 1:
        new.add_uint16("split.count", parts)
    for tensor in reader.tensors[: len(reader.tensors) // parts]:
        data, dtype = tensor.data, None
        if kind is not None and len(tensor.shape) > 1 and tensor.shape[0] % 32 == 0:
            dtype = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(data, dtype)
        new.add_tensor(tensor.name, data, raw_dtype=dtype)
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()
    return out


def fault(path: Path) -> str:
    (line,) = verify(path).faults
    return line


def test_an_export_is_intact(exported: Path) -> None:
    assert verify(exported).faults == []


def test_a_requantised_export_is_said_to_be_requantised(exported: Path, tmp_path: Path) -> None:
    requantised = rewrite(exported, tmp_path / "q8.gguf", kind="Q8_0")
    says(fault(requantised), f"{requantised}: requantised since by another tool", "F32", "Q8_0")


def test_changed_metadata_is_told_from_changed_tensors(exported: Path, tmp_path: Path) -> None:
    edited = rewrite(exported, tmp_path / "chat.gguf", tokenizer__chat_template="{{ messages }}", general__note="mine")
    says(fault(edited), f"{edited}: its metadata changed", "tensors are those that pgprune wrote")
    content = bytearray(edited.read_bytes())
    content[-64] ^= 1  # in the last tensor
    edited.write_bytes(content)
    says(fault(edited), f"{edited}: changed since the export")


def test_gguf_s_own_tool_for_metadata_changes_metadata_only(exported: Path, tmp_path: Path) -> None:
    tool = pytest.importorskip("gguf.scripts.gguf_new_metadata")
    reader = gguf.GGUFReader(exported)
    new = gguf.GGUFWriter(tmp_path / "new.gguf", reader.fields["general.architecture"].contents())
    chat = {gguf.Keys.General.NAME: tool.MetadataDetails(gguf.GGUFValueType.STRING, "another name")}
    tool.copy_with_new_metadata(reader, new, chat, [])
    assert "its metadata changed" in fault(tmp_path / "new.gguf")


def test_a_part_of_a_split_export_is_said_to_be_one(exported: Path, tmp_path: Path) -> None:
    part = rewrite(exported, tmp_path / "small-00001-of-00002.gguf", parts=2)
    says(fault(part), f"{part}: one of 2 parts", "--merge")


def test_a_file_with_a_changed_tensor_or_checksum_is_changed(exported: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copy(exported, tmp_path / "changed.gguf"))
    content = bytearray(changed.read_bytes())
    content[-64] ^= 1
    changed.write_bytes(content)
    says(fault(changed), f"{changed}: changed since the export")


def test_a_part_of_a_split_model_is_refused_as_a_base(exported: Path, tmp_path: Path) -> None:
    from pgprune_cli.model.loading import check_prunable

    part = rewrite(exported, tmp_path / "small-00001-of-00002.gguf", parts=2)
    with refused(f"{part}: ", "one of 2 parts", "--merge"):
        check_prunable(resolve(str(part)))
