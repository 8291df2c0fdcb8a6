"""Windows and batches: nothing is seen twice, and held-out windows are never searched over."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.messages import refused
from helpers.texts import TEXTS, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.data.windows import Batches, calibration_text, cut_windows


@given(length=st.integers(0, 100), seqlen=st.integers(1, 20))
@settings(deadline=None)
def test_cut_windows_keeps_the_order_and_drops_an_incomplete_last_window(length: int, seqlen: int) -> None:
    rows = cut_windows(torch.arange(length), seqlen)
    assert rows.shape == (length // seqlen, seqlen)
    assert rows.flatten().tolist() == list(range(length // seqlen * seqlen))


@given(length=st.integers(0, 100), seqlen=st.integers(2, 20))
@settings(deadline=None)
def test_windows_with_bos_begin_with_it_and_lose_no_token_between_them(length: int, seqlen: int) -> None:
    rows = cut_windows(torch.arange(length), seqlen, bos=1000)
    assert rows.shape == (length // (seqlen - 1), seqlen)
    assert rows[:, 0].tolist() == [1000] * len(rows)
    assert rows[:, 1:].flatten().tolist() == list(range(length // (seqlen - 1) * (seqlen - 1)))


def use_numbered_tokens(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let `calibration_text` read the tokens 0, 1, 2, …, so that a window shows where it comes from."""
    monkeypatch.setattr("pgprune_cli.data.windows.tokens_of", lambda *_, **__: torch.arange(count))


@pytest.mark.parametrize("length", [24, 31, 32, 100, 1001])
@pytest.mark.parametrize("windows", [1, 5, 1000])
def test_calibration_text_never_searches_over_heldout_windows(
    length: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_numbered_tokens(monkeypatch, length)
    text = calibration_text("any", None, windows=windows, heldout=2, seqlen=8)
    searched, heldout = text.search.flatten().tolist(), text.heldout.flatten().tolist()
    assert text.heldout.shape == (2, 8)
    assert len(text.search) == min(windows, length // 8 - 2)
    assert len(set(searched + heldout)) == len(searched + heldout)
    for row in (*text.search.tolist(), *text.heldout.tolist()):
        assert row == list(range(row[0], row[0] + 8))
    assert sorted([*text.stream.tolist(), *heldout]) == list(range(length))
    assert text.stream.tolist() == sorted(text.stream.tolist())


@pytest.mark.parametrize("length", [21, 27, 28, 100, 1001])
@pytest.mark.parametrize("windows", [1, 5, 1000])
def test_calibration_text_with_bos_has_windows_of_the_same_shape(
    length: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_numbered_tokens(monkeypatch, length)
    text = calibration_text("any", None, windows=windows, heldout=2, seqlen=8, bos=5000)
    assert text.heldout.shape == (2, 8)
    heldout = text.heldout[:, 1:].flatten().tolist()
    assert text.search.shape == (min(windows, length // 7 - 2), 8)
    searched = text.search[:, 1:].flatten().tolist()
    assert len(set(searched + heldout)) == len(searched + heldout)
    longest = text.long_windows(count=4, seqlen=5000)
    assert longest.tolist() == [[5000, *(token for token in range(length) if token not in heldout)]]
    for rows in (text.search, text.heldout, longest):
        assert (rows[:, 0] == 5000).all()


def test_calibration_text_spreads_few_windows_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    use_numbered_tokens(monkeypatch, 1016)
    text = calibration_text("any", None, windows=10, heldout=2, seqlen=8)
    starts = text.search[:, 0]
    assert starts.diff().max() - starts.diff().min() <= 16  # there may be a held-out window in between
    assert starts[0] < 104
    assert starts[-1] >= 1000 - 104


@pytest.mark.parametrize(("length", "count"), [(8000, 10), (8000, 100), (808, 100)])
def test_heldout_windows_are_spread_over_the_text(length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_numbered_tokens(monkeypatch, length)
    text = calibration_text("any", None, windows=1000, heldout=count, seqlen=8)
    starts = text.heldout[:, 0]
    part = length / count
    assert len(starts) == count
    for place, start in enumerate(starts.tolist()):
        assert place * part - 8 <= start < (place + 1) * part


def test_long_windows_leave_out_the_heldout_part(monkeypatch: pytest.MonkeyPatch) -> None:
    use_numbered_tokens(monkeypatch, 1000)
    text = calibration_text("any", None, windows=3, heldout=2, seqlen=8)
    longer = text.long_windows(count=4, seqlen=100)
    assert longer.shape == (4, 100)
    heldout = set(text.heldout.flatten().tolist())
    assert len(heldout) == 16 and not heldout & set(longer.flatten().tolist())
    assert text.long_windows(count=4, seqlen=5000).tolist() == [[n for n in range(1000) if n not in heldout]]


def test_calibration_text_refuses_a_corpus_that_is_too_short(tokenizer: Any) -> None:
    Path("a.txt").write_text(TEXTS[0])
    count = len(token_ids(tokenizer, TEXTS[:1]))
    with refused("a.txt", f"{count} tokens", "calibration.heldout", "calibration.seqlen"):
        calibration_text("a.txt", tokenizer, windows=4, heldout=3, seqlen=128)


@pytest.mark.parametrize(("length", "is_enough"), [(23, False), (24, True)])
def test_calibration_text_needs_one_window_to_search_over(
    length: int, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_numbered_tokens(monkeypatch, length)
    if is_enough:
        assert len(calibration_text("any", None, windows=9, heldout=2, seqlen=8).search) == 1
    else:
        with refused("23 tokens"):
            calibration_text("any", None, windows=9, heldout=2, seqlen=8)


# --- batches


@given(rows=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_holds_every_window_at_most_once_and_only_whole_batches(
    rows: int, batch: int, seed: int, epoch: int
) -> None:
    batches = Batches(torch.arange(rows)[:, None] * torch.ones(1, 3, dtype=torch.int64), batch, seed)
    size = min(batch, rows)
    an_epoch = rows // size
    shown = [batches.at(position) for position in range(epoch * an_epoch, (epoch + 1) * an_epoch)]
    assert all(shown_batch.shape == (size, 3) for shown_batch in shown)
    numbers = torch.cat(shown)[:, 0].tolist()
    assert len(set(numbers)) == len(numbers) == an_epoch * size
    assert set(numbers) <= set(range(rows))
    if rows % size == 0:
        assert sorted(numbers) == list(range(rows))


def test_batches_repeat_for_a_seed_and_differ_between_epochs_and_seeds() -> None:
    rows = torch.arange(64)[:, None]

    def epoch(number: int, seed: int) -> list[int]:
        batches = Batches(rows, 8, seed)
        return [int(x) for place in range(8) for x in batches.at(number * 8 + place)]

    assert epoch(0, seed=1) == epoch(0, seed=1)
    orders = [epoch(0, seed=1), epoch(1, seed=1), epoch(2, seed=1), epoch(0, seed=2), list(range(64))]
    assert len({tuple(order) for order in orders}) == 5


def test_a_batch_depends_only_on_its_position() -> None:
    batches = Batches(torch.arange(40)[:, None], 8, seed=3)
    alone = batches.at(17)
    for position in (0, 99, 3):
        batches.at(position)
    assert torch.equal(batches.at(17), alone)
    torch.manual_seed(123)
    assert torch.equal(batches.at(17), alone)
