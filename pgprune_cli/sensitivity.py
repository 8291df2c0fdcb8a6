"""Which directions of the residual stream the loss feels: forward passes only.

An error e in the normalised stream in front of the unembedding U moves the loss by ½ eᵀG e, to second order and on
average over what the model itself would say: G = E[Uᵀ (diag p − p pᵀ) U], times the final norm's weights on both sides.
That is the Gauss-Newton matrix of the loss at the last layer, in closed form. Through the residual stream an error of a
late layer reaches the unembedding nearly unchanged, one of an early layer is transformed by all that follows: late
layers are judged mostly by G, the first half by length alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pgprune_cli.arch import Shape
from pgprune_cli.errors import RunError

SHARE = 0.7
"""Of G in the last layer's mixture with the identity; it falls linearly to 0 at the middle layer."""

WINDOWS = 16
"""Of the calibration text, at least, that the average is taken over."""

LOGIT_ROWS = 256


def windows_run(batches: int) -> int:
    """How many windows of so many batches the average is taken over, where each batch has enough of them."""
    return batches * -(-WINDOWS // batches)


def error_roots(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """By layer R `(hidden, hidden)` float64 on the model's device: an output error e costs ‖R e‖², as much as ‖e‖² on
    average over directions.

    `batches` of tokens `(B, T)`: some windows of each are run.
    """
    curvature = output_curvature(model, batches)
    identity = torch.eye(len(curvature), dtype=torch.float64, device=curvature.device)
    layers = len(model.get_submodule(Shape.of(model).spec.layers))  # type: ignore[arg-type]
    roots = []
    for index in range(layers):
        share = SHARE * max(0.0, 2 * index / max(1, layers - 1) - 1)
        roots.append(_root(identity + share * (curvature - identity)) if share else identity)
    return roots


@torch.no_grad()
def output_curvature(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """G `(hidden, hidden)` float64, scaled so that its diagonal's mean is 1.

    Raises ValueError without batches, RunError where the model overflows.
    """
    if not batches:
        raise ValueError("there is no calibration text to run")
    spec = Shape.of(model).spec
    unembedding: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    norm: Tensor = model.get_submodule(spec.norm).weight.double()  # type: ignore[operator, assignment]
    rows = windows_run(len(batches)) // len(batches)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    chance = torch.zeros(len(unembedding), device=unembedding.device)
    expected = torch.zeros(unembedding.shape[1], unembedding.shape[1], device=unembedding.device)
    tokens = 0
    for batch in batches:
        hidden = model.get_decoder()(input_ids=batch[:rows].to(device), use_cache=False).last_hidden_state  # type: ignore[operator]
        for some in hidden.flatten(0, 1).to(unembedding.device).split(LOGIT_ROWS):
            probability = (some @ unembedding.T).float().softmax(-1)
            chance += probability.sum(0)
            mean = (probability.to(unembedding.dtype) @ unembedding).float()
            expected += mean.T @ mean
            tokens += len(some)
    weighted = torch.zeros_like(expected)
    for part, some in zip(unembedding.split(LOGIT_ROWS * 16), chance.split(LOGIT_ROWS * 16), strict=True):
        weighted += (part.float() * some[:, None]).T @ part.float()
    curvature = (weighted - expected).double() / tokens
    curvature = norm[:, None] * curvature * norm
    if not curvature.isfinite().all():
        raise RunError("the logits on the calibration text are not finite; try dtype float32 or bfloat16")
    return curvature / curvature.diagonal().mean()


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
