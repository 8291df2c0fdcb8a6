"""What the repair reads: calibration text, and text that the dense model writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.contexts import context_of
from helpers.models import save_tokenizer, tiny_model
from helpers.processes import run_together
from torch import Tensor

from pgprune_cli.console.progress import Progress
from pgprune_cli.data.tokens import first_token, ordinary_tokens
from pgprune_cli.data.windows import CalibrationText, interleaved
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search import sampled_text
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.sampled_text import text_of_repair
from pgprune_cli.search.texts import empty_repair_batches, empty_sampled_batches

LENGTH, WINDOWS, SAMPLED = 32, 8, 5
SETTINGS = (
    "repair.method=least-squares",
    f"calibration.seqlen={LENGTH}",
    f"repair.windows={WINDOWS}",
    f"repair.sampled_windows={SAMPLED}",
)
PAD = 0
"""A special token. The calibration text consists of it, so the sampled windows are those that do not."""


@pytest.fixture
def saved_with_tokenizer(tmp_path: Path) -> Path:
    model = tiny_model("llama-gqa")
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def context(recipe: Recipe, saved: Path, bos: int | None = None) -> SearchContext:
    windows = torch.full((20, recipe.calibration.seqlen), PAD)
    text = CalibrationText(windows, windows, windows.flatten(), bos)
    context = context_of(recipe, PrunableModel.of(tiny_model("llama-gqa")), saved, text)
    return replace(context, source=resolve(str(saved)))


def is_sampled(windows: Tensor) -> Tensor:
    return (windows != PAD).any(1)


def test_sampled_windows_lie_evenly_among_those_of_the_text(small, saved_with_tokenizer: Path) -> None:
    own = context(small(*SETTINGS), saved_with_tokenizer)
    batches = text_of_repair(own)
    windows = torch.cat(batches)
    assert windows.shape == (WINDOWS + SAMPLED, LENGTH)
    assert int(is_sampled(windows).sum()) == SAMPLED
    places = is_sampled(windows).nonzero()[:, 0]
    assert set(places.diff().tolist()) <= {2, 3}
    ordinary = ordinary_tokens(load_tokenizer(own.source), 96)
    assert bool(ordinary[windows[is_sampled(windows)]].all())
    assert not torch.equal(windows[places[0]], windows[places[1]])
    expected = empty_repair_batches(own.recipe, own.text)
    assert [batch.shape for batch in expected] == [batch.shape for batch in batches]
    assert {batch.device.type for batch in expected} == {"meta"}


def test_sampled_windows_begin_with_bos_if_those_of_the_text_do(small, saved_with_tokenizer: Path) -> None:
    windows = torch.cat(text_of_repair(context(small(*SETTINGS), saved_with_tokenizer, bos=1)))
    own = windows[is_sampled(windows)]
    assert own.shape == (SAMPLED, LENGTH)
    assert bool((own[:, 0] == 1).all())
    assert bool((own[:, 1:] != 1).all())


def test_nothing_is_written_unless_it_is_asked_for(small, saved_with_tokenizer: Path) -> None:
    none = small("repair.windows=8")
    own = context(none, saved_with_tokenizer)
    assert text_of_repair(own) is own.repair_batches
    assert all(map(torch.equal, empty_repair_batches(none, own.text), own.repair_batches))
    assert empty_sampled_batches(small(*SETTINGS, "repair.method=none")) == []


def test_the_text_depends_on_the_seed_and_not_on_the_processes(small, saved_with_tokenizer: Path) -> None:
    recipe = small(*SETTINGS)
    assert len(empty_sampled_batches(recipe)) == 3
    first, again, other = (
        torch.cat(text_of_repair(context(given, saved_with_tokenizer)))
        for given in (recipe, recipe, small(*SETTINGS, "seed=1"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    own = context(recipe, saved_with_tokenizer)
    for world in (2, 4):
        texts = run_together(world, lambda ranks: torch.cat(text_of_repair(replace(own, ranks=ranks))))
        assert all(torch.equal(text, first) for text in texts)


def test_the_user_is_told_for_as_long_as_the_model_writes(
    small, saved_with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Told(Progress):
        @contextmanager
        def working(self, text: str) -> Iterator[None]:
            told.append(text)
            yield
            told.clear()

    def writing(*arguments: object) -> Iterator[Tensor]:
        for rows in sampling(*arguments):
            assert told == ["letting the dense model write text"]
            yield rows

    sampling = sampled_text.sampled_batches
    monkeypatch.setattr(sampled_text, "sampled_batches", writing)
    text_of_repair(replace(context(small(*SETTINGS), saved_with_tokenizer), progress=Told()))
    assert told == []


def test_special_tokens_are_neither_drawn_nor_are_paddings_of_the_embeddings(saved_with_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(saved_with_tokenizer)))
    count = len(tokenizer)
    ordinary = ordinary_tokens(tokenizer, count + 4)
    assert ordinary.shape == (count + 4,)
    assert not ordinary[count:].any()
    assert not ordinary[tokenizer.all_special_ids].any()
    assert not ordinary[first_token(tokenizer, "model", "")]
    assert int(ordinary.sum()) >= count - len(tokenizer.get_added_vocab()) > 10
    tokenizer.add_tokens(["<unseen>"], special_tokens=True)
    assert not ordinary_tokens(tokenizer, count + 4)[count]
    assert len(ordinary_tokens(tokenizer, 9)) == 9


def test_rows_of_all_parts_are_evenly_spread() -> None:
    parts = [torch.arange(4), 10 + torch.arange(2), torch.arange(0)]
    assert interleaved(parts).tolist() == [0, 10, 1, 2, 11, 3]
    assert interleaved(parts[:1]).tolist() == [0, 1, 2, 3]
