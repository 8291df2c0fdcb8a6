"""The teacher, live and on disk: both predict the same, and a cache is whole, belongs to its recovery, and resumes."""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.messages import refused
from helpers.models import VOCABULARY, tiny_model

from pgprune_cli.console.progress import Progress
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError
from pgprune_cli.recover import teacher_cache
from pgprune_cli.recover.loss import divergences
from pgprune_cli.recover.teacher import LiveTeacher
from pgprune_cli.recover.teacher_cache import CachedTeacher, CacheKey
from pgprune_cli.recover.teacher_writing import cached_teacher
from pgprune_cli.recover.texts import RecoveryText
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import TEACHER_RECORD, teacher_shard

ROWS = torch.tensor([8, 0, 5])


@pytest.fixture(scope="module")
def text() -> RecoveryText:
    generator = torch.Generator().manual_seed(0)
    return RecoveryText.of(torch.randint(VOCABULARY, (9, 12), generator=generator), 2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shard hold four windows of 8 tokens in 4 bytes at 12 positions."""
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 4 * 12 * 8 * 4)


def key_of(text: RecoveryText, top_k: int = 8, temperature: float = 1.5, **changes: Any) -> CacheKey:
    return CacheKey(**vars(CacheKey.of("fingerprint", text, VOCABULARY, top_k, temperature)) | changes)


def write(folder: Path, text: RecoveryText, key: CacheKey | None = None, **options: Any) -> CachedTeacher:
    key = key or key_of(text)
    options = {"load": lambda: LiveTeacher(tiny_model("llama-gqa"), key.top_k, key.temperature)} | options
    return cached_teacher(folder, key, text, batch=3, **options)


def never() -> LiveTeacher:
    raise AssertionError("the dense model was loaded although its predictions are complete")


# --- the live teacher


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2"])
def test_live_teacher_predicts_what_its_model_does(architecture: str, text: RecoveryText) -> None:
    model, windows = tiny_model(architecture), text.windows[ROWS]
    expected = (model(input_ids=windows).logits / 1.5).log_softmax(-1)
    whole = LiveTeacher(model, 0, 1.5).targets(windows, ROWS)
    assert whole.tokens is whole.hidden is None
    torch.testing.assert_close(whole.log_probs.log_softmax(-1), expected)
    likeliest = LiveTeacher(model, 5, 1.5).targets(windows, ROWS)
    assert torch.equal(likeliest.tokens, expected.topk(5).indices)
    torch.testing.assert_close(likeliest.log_probs, expected.topk(5).values)
    in_order = LiveTeacher(model, VOCABULARY, 1.5).targets(windows, ROWS)
    assert in_order.tokens is None
    torch.testing.assert_close(in_order.log_probs, expected)


def test_live_teacher_returns_the_residual_stream_and_ignores_autocast(text: RecoveryText) -> None:
    model, windows = tiny_model("llama-gqa"), text.windows[ROWS]
    states = model(input_ids=windows, output_hidden_states=True).hidden_states
    with torch.autocast("cpu", torch.bfloat16):
        targets = LiveTeacher(model, 5, 1.0, hidden=(0, 2)).targets(windows, ROWS)
    assert targets.log_probs.dtype == torch.float32
    for stream, layer in zip(targets.hidden, (0, 2), strict=True):
        assert torch.equal(stream, states[layer + 1])


# --- the cache


@pytest.mark.parametrize("top_k", [8, VOCABULARY], ids=["top-k", "all"])
def test_cached_teacher_equals_the_live_one_up_to_float16(top_k: int, text: RecoveryText, tmp_path: Path) -> None:
    cached = write(tmp_path / "cache", text, key_of(text, top_k)).targets(text.windows[ROWS], ROWS)
    live = LiveTeacher(tiny_model("llama-gqa"), top_k, 1.5).targets(text.windows[ROWS], ROWS)
    torch.testing.assert_close(cached.log_probs, live.log_probs, rtol=2**-11, atol=1e-6)
    assert (cached.tokens is None) == (live.tokens is None)
    assert cached.tokens is None or torch.equal(cached.tokens, live.tokens)
    logits = tiny_model("llama-gqa", seed=1)(input_ids=text.windows[ROWS]).logits
    losses = [divergences(logits, targets, 1.5).mean().item() for targets in (cached, live)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_top_k_divergence_is_a_lower_bound_that_grows_to_the_whole(text: RecoveryText, tmp_path: Path) -> None:
    logits = tiny_model("llama-gqa", seed=1)(input_ids=text.windows[ROWS]).logits
    losses = []
    for top_k in (2, 16, 64):
        cached = write(tmp_path / f"{top_k}", text, key_of(text, top_k)).targets(text.windows[ROWS], ROWS)
        losses.append(divergences(logits, cached, 1.5).mean().item())
    whole = LiveTeacher(tiny_model("llama-gqa"), 0, 1.5).targets(text.windows[ROWS], ROWS)
    losses.append(divergences(logits, whole, 1.5).mean().item())
    assert losses == sorted(losses)


def test_cache_reports_what_it_covers_and_its_size_and_forgets_the_model(text: RecoveryText, tmp_path: Path) -> None:
    said, models = [], []

    class Listening(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    def load() -> LiveTeacher:
        model = tiny_model("llama-gqa")
        models.append(weakref.ref(model))
        return LiveTeacher(model, 8, 1.5)

    cached = write(tmp_path / "cache", text, load=load, progress=Listening())
    gc.collect()
    assert models[0]() is None
    probabilities = (tiny_model("llama-gqa")(input_ids=text.windows).logits / 1.5).softmax(-1)
    assert cached.covered == pytest.approx(probabilities.topk(8).values.sum(-1).mean().item(), rel=1e-3)
    assert "8 most likely" in said[0]
    assert f"{cached.covered:.2%}" in said[0]
    written = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    key = key_of(text)
    assert key.window_bytes * 9 < written <= key.bytes_of(key.shards) < written + 1024 * len(key.shards)


def test_only_trained_positions_count_as_covered(text: RecoveryText, tmp_path: Path) -> None:
    trained = torch.zeros(text.windows.shape, dtype=torch.bool)
    trained[3, 4] = True
    chat = RecoveryText.of(text.windows, 2, trained)
    assert chat.digest != text.digest
    probabilities = (tiny_model("llama-gqa")(input_ids=text.windows).logits / 1.5).softmax(-1)[3, 4]
    assert write(tmp_path / "cache", chat).covered == pytest.approx(probabilities.topk(8).values.sum().item(), rel=1e-3)


def test_cache_resumes_at_the_first_missing_shard(text: RecoveryText, tmp_path: Path) -> None:
    whole, folder, key, stop = tmp_path / "whole", tmp_path / "cache", key_of(text), []
    write(whole, text)

    class Stopped(LiveTeacher):
        def targets(self, windows: Any, rows: Any) -> Any:
            stop.extend([2] * (6 in rows.tolist()))  # a signal comes while the second shard is computed
            return super().targets(windows, rows)

    with pytest.raises(Interrupted):
        write(folder, text, load=lambda: Stopped(tiny_model("llama-gqa"), 8, 1.5), stop=stop)
    assert [teacher_shard(folder, index).exists() for index in range(3)] == [True, False, False]
    with refused("not complete"):
        CachedTeacher(folder, key)
    first = teacher_shard(folder, 0).stat().st_mtime_ns
    write(folder, text)
    assert teacher_shard(folder, 0).stat().st_mtime_ns == first
    for index in range(3):
        assert teacher_shard(folder, index).read_bytes() == teacher_shard(whole, index).read_bytes()
    assert (folder / TEACHER_RECORD).read_bytes() == (whole / TEACHER_RECORD).read_bytes()
    write(folder, text, load=never)
    assert not list(folder.glob(".*"))


def test_damaged_cache_is_refused_and_written_again_once_the_file_is_removed(
    text: RecoveryText, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    write(folder, text)
    shard = teacher_shard(folder, 1)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with refused("predictions-00001.safetensors", "damaged", "Remove this file"):
        write(folder, text, load=never)
    shard.write_bytes(teacher_shard(folder, 0).read_bytes())
    with refused("predictions-00001.safetensors", "another cache"):
        write(folder, text, load=never)
    shard.unlink()
    write(folder, text)
    write(folder, text, load=never)
    record = folder / TEACHER_RECORD
    record.write_text(record.read_text().replace('"top_k": 8', '"top_k": 9'))
    with refused(TEACHER_RECORD, "damaged"):
        write(folder, text, load=never)


def test_foreign_cache_is_refused_and_shared_caches_lie_apart(text: RecoveryText, tmp_path: Path) -> None:
    write(tmp_path, text)
    other = RecoveryText.of(text.windows.flip(0), 2)
    foreign = {
        "the dense model": key_of(text, teacher="another"),
        "the text": key_of(other),
        "recover.top_k": key_of(text, 7),
        "recover.temperature": key_of(text, temperature=1.0),
    }
    for difference, key in foreign.items():
        with refused(str(tmp_path), difference, "--teacher-cache"):
            write(tmp_path, other, key, load=never)
    keys = [key_of(text), *foreign.values()]
    assert len({key.folder_in(tmp_path) for key in keys}) == len(keys)
    assert key_of(text).folder_in(tmp_path) == key_of(text).folder_in(tmp_path)


def test_full_disk_is_refused_with_the_size_of_what_is_missing(
    text: RecoveryText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(text, windows=10**6)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**8))
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1 << 25)
    with refused(str(tmp_path), "0.38 GB", "0.10 GB", error=RunError):
        write(tmp_path / "cache", text, key, load=never)
    assert not teacher_shard(tmp_path / "cache", 0).exists()


def test_processes_share_the_shards(text: RecoveryText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    monkeypatch.setattr(Ranks, "max", lambda self, value: value)
    write(tmp_path / "whole", text)
    with refused("not complete"):  # this barrier does not wait for the writer
        write(tmp_path / "cache", text, ranks=Ranks(1, 2))
    written = [index for index in range(3) if teacher_shard(tmp_path / "cache", index).exists()]
    assert written == [1]
    write(tmp_path / "cache", text, ranks=Ranks(0, 2))
    for index in range(3):
        shard = teacher_shard(tmp_path / "cache", index)
        assert shard.read_bytes() == teacher_shard(tmp_path / "whole", index).read_bytes()


def test_signal_that_another_process_got_stops_all_of_them(
    text: RecoveryText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    monkeypatch.setattr(Ranks, "max", lambda self, value: max(value, 15))
    with pytest.raises(Interrupted) as caught:
        write(tmp_path / "cache", text, ranks=Ranks(1, 2))
    assert caught.value.signum == 15
    assert [teacher_shard(tmp_path / "cache", index).exists() for index in range(3)] == [False, True, False]


def test_predictions_that_are_not_numbers_are_refused(text: RecoveryText, tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    model.model.norm.weight.fill_(torch.nan)
    with refused("NaN", error=RunError):
        write(tmp_path / "cache", text, load=lambda: LiveTeacher(model, 8, 1.5))
