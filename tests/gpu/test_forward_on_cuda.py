"""On the chip: no wait for the device inside a forward. Skipped where there is no CUDA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.masks import MODEL_MASKS, some_tokens
from helpers.models import tiny_model

from pgprune_cli.forward.masked import Evaluator, summed_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MODEL_MASKS)
def test_the_host_never_waits_inside_a_forward(name: str, architecture: str, request: pytest.FixtureRequest) -> None:
    evaluator, tokens = Evaluator(tiny_model(architecture).cuda()), some_tokens().cuda()
    with evaluator.shrunk(MODEL_MASKS[name]):
        summed_loss(evaluator.model, tokens)  # the first one sets up libraries
        torch.cuda.synchronize()
        request.getfixturevalue("waiting_is_an_error")
        summed_loss(evaluator.model, tokens)
