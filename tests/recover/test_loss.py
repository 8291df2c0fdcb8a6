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


@pytest.mark.parametrize("k", [0, 4])
def test_divergences_are_those_of_every_position(logits, k: int) -> None:
    student, teacher = logits
    log_probs, tokens = teacher.log_softmax(-1).float().topk(k or V)
    if not k:
        log_probs, tokens = teacher, None
    found = divergences(student, Targets(log_probs, tokens))
    assert found.shape == (B, T)
    for window in range(B):
        for position in range(T):
            place = (slice(window, window + 1), slice(position, position + 1))
            alone = Targets(log_probs[place], None if tokens is None else tokens[place])
            torch.testing.assert_close(found[place], divergences(student[place], alone))


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
