"""The losses of a recovery, against exact references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgprune_cli.recover.loss import divergences, hidden_errors, text_losses
from pgprune_cli.recover.teacher import Targets

B, T, V = 2, 3, 11


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher, float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, B, T, V, generator=generator, dtype=torch.float64)
    return student, teacher


def most_likely(teacher: Tensor, k: int, temperature: float = 1.0) -> Targets:
    log_probs, tokens = (teacher / temperature).log_softmax(-1).float().topk(k)
    return Targets(log_probs, tokens)


def exact(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_over_all_tokens_equals_its_definition(logits, temperature: float) -> None:
    student, teacher = logits
    whole = Targets((teacher / temperature).log_softmax(-1).float(), None)
    expected = exact(student, teacher, temperature).float()
    torch.testing.assert_close(divergences(student, whole, temperature), expected, rtol=1e-4, atol=1e-5)
    for_all = most_likely(teacher, V, temperature)
    torch.testing.assert_close(divergences(student, for_all, temperature), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_over_the_likeliest_tokens_counts_the_others_as_one(logits, temperature: float) -> None:
    student, teacher = logits
    full, before = exact(student, teacher, temperature), torch.zeros(B, T, dtype=torch.float64)
    for k in range(1, V):
        found = divergences(student, most_likely(teacher, k, temperature), temperature).double()
        tokens = teacher.topk(k).indices
        p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
        listed = [each.gather(-1, tokens) for each in (p, q)]
        bucketed = [torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in listed]
        expected = (bucketed[0] * (bucketed[0] / bucketed[1]).log()).sum(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found <= full + 1e-5).all()  # a lower bound, which rises with k
        assert (found >= before - 1e-5).all()
        before = found


@pytest.mark.parametrize("k", [0, 1, 4, V])
def test_gradient_of_the_divergence_equals_finite_differences(logits, k: int) -> None:
    student, teacher = logits
    targets = most_likely(teacher, k) if k else Targets(teacher.log_softmax(-1).float(), None)
    targets = Targets(targets.log_probs.double(), targets.tokens)
    student = student.clone().requires_grad_(True)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(1))
    (divergences(student, targets, 1.5) * weights).sum().backward()
    step = 1e-2  # the function rounds to float32
    for place in [(0, 0, 0), (1, 2, 5), (0, 1, 10), (1, 0, int(teacher[1, 0].argmax()))]:
        moved = []
        for sign in (1, -1):
            other = student.detach().clone()
            other[place] += sign * step
            moved.append(float((divergences(other, targets, 1.5) * weights).sum()))
        assert float(student.grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-4)


def test_divergence_is_finite_where_the_listed_tokens_are_all_that_is_likely() -> None:
    student = torch.tensor([[[100.0, 0.0, -100.0]]], requires_grad=True)
    loss = divergences(student, Targets(torch.tensor([[[0.0]]]), torch.tensor([[[0]]])))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.isfinite().all()


def test_hidden_errors_are_relative_and_averaged_over_layers() -> None:
    theirs = [torch.full((B, T, 4), 2.0), torch.full((B, T, 4), 5.0)]
    ours = [theirs[0] * 1.5, theirs[1]]
    torch.testing.assert_close(hidden_errors(ours, theirs), torch.full((B, T), 0.125))


def test_text_losses_are_those_of_the_next_token(logits) -> None:
    student, _ = logits
    windows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    losses = text_losses(student, windows)
    assert losses[0, 1].item() == pytest.approx(-student[0, 1].log_softmax(-1)[3].item(), rel=1e-5)
    assert losses[:, -1].tolist() == [0, 0]
