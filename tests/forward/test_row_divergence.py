"""The divergence of rows of predictions and its gradient, against exact references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pgprune_cli.forward import row_divergence
from pgprune_cli.forward.row_divergence import row_divergences

ROWS, V = 6, 11


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute four rows at a time."""
    monkeypatch.setattr(row_divergence, "SOFTMAX_ROWS", 4)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Logits of a model and of its reference, float64."""
    own, reference = 3 * torch.randn(2, ROWS, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return own, reference


def most_likely(reference: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the k most likely tokens, and their ids."""
    log_probs, tokens = (reference / temperature).log_softmax(-1).float().topk(k)
    return log_probs, tokens


def exact(own: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = ((logits / temperature).softmax(-1) for logits in (reference, own))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_over_all_tokens_equals_its_definition(logits, temperature: float) -> None:
    own, reference = logits
    expected = exact(own, reference, temperature).float()
    for whole in (reference / temperature, (reference / temperature).log_softmax(-1).float()):
        found = row_divergences(own, whole, None, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = row_divergences(own, *most_likely(reference, V, temperature), temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_over_the_likeliest_tokens_counts_the_others_as_one(logits, temperature: float) -> None:
    own, reference = logits
    full, before = exact(own, reference, temperature), torch.zeros(ROWS, dtype=torch.float64)
    for k in range(1, V):
        found = row_divergences(own, *most_likely(reference, k, temperature), temperature).double()
        tokens = reference.topk(k).indices
        p, q = ((logits / temperature).softmax(-1) for logits in (reference, own))
        listed = [each.gather(-1, tokens) for each in (p, q)]
        bucketed = [torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in listed]
        expected = (bucketed[0] * (bucketed[0] / bucketed[1]).log()).sum(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found <= full + 1e-5).all()  # a lower bound, which rises with k
        assert (found >= before - 1e-5).all()
        before = found


@pytest.mark.parametrize("k", [0, 1, 4, V])
def test_gradient_of_the_divergence_equals_finite_differences(logits, k: int) -> None:
    own, reference = logits
    log_probs, tokens = most_likely(reference, k) if k else (reference.log_softmax(-1).float(), None)
    known = (log_probs.double(), tokens, 1.5)
    own = own.clone().requires_grad_(True)
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    (row_divergences(own, *known) * weights).sum().backward()
    step = 1e-2  # the function rounds to float32
    for place in [(0, 0), (5, 5), (1, 10), (3, int(reference[3].argmax()))]:
        moved = []
        for sign in (1, -1):
            other = own.detach().clone()
            other[place] += sign * step
            moved.append(float((row_divergences(other, *known) * weights).sum()))
        assert float(own.grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-4)


def test_divergence_is_finite_where_the_listed_tokens_are_all_that_is_likely() -> None:
    own = torch.tensor([[100.0, 0.0, -100.0]], requires_grad=True)
    divergence = row_divergences(own, torch.tensor([[0.0]]), torch.tensor([[0]]))
    divergence.sum().backward()
    assert divergence.item() == pytest.approx(0.0, abs=1e-6)
    assert own.grad.isfinite().all()


def test_gradient_is_finite_where_all_other_tokens_have_next_to_no_probability() -> None:
    """As at a low temperature, where the rounded reference leaves them more than the model does."""
    own = torch.tensor([[0.0, -100.0, -101.0]], requires_grad=True)
    row_divergences(own, torch.tensor([[-1e-4]]), torch.tensor([[0]])).sum().backward()
    rest, parts = 1 - math.exp(-1e-4), torch.tensor([-100.0, -101.0], dtype=torch.float64).softmax(0)
    assert own.grad[0].tolist() == pytest.approx([rest, -rest * float(parts[0]), -rest * float(parts[1])], rel=1e-3)


def test_gradient_has_the_dtype_of_the_logits(logits) -> None:
    own, reference = (each.bfloat16() for each in logits)
    own.requires_grad_(True)
    divergence = row_divergences(own, reference)
    assert divergence.dtype == torch.float32
    divergence.sum().backward()
    expected = own.detach().float().softmax(-1) - reference.float().softmax(-1)
    torch.testing.assert_close(own.grad, expected.bfloat16(), rtol=1e-2, atol=1e-3)
