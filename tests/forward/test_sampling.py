"""Text that a model draws from its own predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor

from pgprune_cli.errors import RunError
from pgprune_cli.forward import sampling
from pgprune_cli.forward.sampling import sampled_batches
from pgprune_cli.model.quantized import quantize_projections

FIRST = 0
EVERY = torch.ones(VOCABULARY, dtype=torch.bool)
SHAPES = [(3, 24), (2, 24)]


def sampled(model: Any, seed: int = 0, ordinary: Tensor = EVERY) -> list[Tensor]:
    return list(sampled_batches(model, FIRST, ordinary, SHAPES, seed))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERT_ARCHITECTURES])
def test_every_token_is_drawn_from_the_prediction_behind_those_before_it(architecture: str) -> None:
    """The same draws from the logits of one pass over the whole text give the same text."""
    check_draws(tiny_model(architecture))


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_rounded_weights_write_text_too(weight_format: str) -> None:
    model = tiny_model("llama-gqa")
    quantize_projections(model, weight_format)
    check_draws(model, tolerance=1e-5 if weight_format == "int8" else 0.05)


def check_draws(model: Any, tolerance: float = 1e-5) -> None:
    for index, rows in enumerate(sampled(model)):
        chances = torch.rand(SHAPES[index], generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        with torch.no_grad():
            read = torch.cat([torch.full((len(rows), 1), FIRST), rows[:, :-1]], dim=1)
            cumulative = model(read, use_cache=False).logits.softmax(-1).double().cumsum(-1)
        below = torch.gather(torch.nn.functional.pad(cumulative, (1, 0)), -1, rows[..., None])[..., 0]
        above = torch.gather(cumulative, -1, rows[..., None])[..., 0]
        assert bool((below - tolerance <= chances).all())
        assert bool((chances <= above + tolerance).all())


def test_tokens_come_as_often_as_the_model_predicts_them() -> None:
    """Of those that may be drawn. Frequencies lie within five standard deviations."""
    model, count, ordinary = tiny_model("llama-gqa"), 4096, EVERY.clone()
    ordinary[::3] = False
    drawn = torch.cat(list(sampled_batches(model, FIRST, ordinary, [(1000, 1)] * 3 + [(1096, 1)], seed=0)))
    with torch.no_grad():
        expected = model(torch.tensor([[FIRST]]), use_cache=False).logits[0, -1].softmax(0) * ordinary
    expected /= expected.sum()
    frequencies = torch.bincount(drawn.flatten(), minlength=VOCABULARY) / count
    assert 1.0 < torch.special.entr(expected).sum() < 4.0  # neither one token nor all of them alike
    assert bool((frequencies[::3] == 0).all())
    assert bool(((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all())


def test_the_text_depends_on_the_seed_alone() -> None:
    model = tiny_model("llama-gqa")
    torch.manual_seed(1)
    texts, state = sampled(model), torch.get_rng_state()
    assert [rows.shape for rows in texts] == [torch.Size(shape) for shape in SHAPES]
    assert all(map(torch.equal, texts, sampled(model)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(texts[0], sampled(model, seed=1)[0])
    assert len({tuple(row) for rows in texts for row in rows.tolist()}) == 5


def test_a_batch_that_does_not_fit_memory_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes, write = tiny_model("llama-gqa"), [], sampling._written
    expected = sampled(model)

    def small(*arguments: Any) -> Tensor:
        sizes.append(len(arguments[-1]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return write(*arguments)

    monkeypatch.setattr(sampling, "_written", small)
    assert all(map(torch.equal, sampled(model), expected))
    assert sizes == [3, 2, 1, 2]


def test_a_model_that_overflows_is_refused() -> None:
    model = tiny_model("llama-gqa")
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        sampled(model)
