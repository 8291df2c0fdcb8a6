"""Which directions of the residual stream the loss feels: forward passes only.

An error e in the normalised stream in front of the unembedding U moves the loss by ½ eᵀG e, to second order and on
average over what the model itself would say: G = E[Uᵀ (diag p − p pᵀ) U], times the final norm's weights on both sides.
That is the Gauss-Newton matrix of the loss at the last layer, in closed form. Through the residual stream an error of a
late layer reaches the unembedding nearly unchanged, one of an early layer is transformed by all that follows: late
layers are judged mostly by G, the first half by length alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.model.prunable import Shape

SHARE = 0.7
"""Of G in the last layer's mixture with the identity; it falls linearly to 0 at the middle layer."""

WINDOWS = 16
"""Of the calibration text, at least, that the average is taken over."""

LOGIT_ROWS = 256


def curvature_windows(batches: Sequence[Tensor]) -> list[Tensor]:
    """The first windows of each of the batches `(B, T)`, as many as the average is taken over."""
    return [batch[: -(-WINDOWS // len(batches))] for batch in batches]


class ErrorRoots:
    """By layer R `(hidden, hidden)` float64: an output error e costs ‖R e‖², on average over directions its square.

    R² is the layer's mixture of G and the identity. All mixtures have G's eigenvectors, so that one decomposition
    serves every layer, and an R exists only while a layer asks for it.
    """

    def __init__(self, curvature: Tensor, layers: int) -> None:
        self.layers = layers
        self.values, self.vectors = torch.linalg.eigh(curvature)

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.layers:
            raise IndexError(index)
        share = SHARE * max(0.0, 2 * index / max(1, self.layers - 1) - 1)
        if not share:
            return torch.eye(len(self.values), dtype=torch.float64, device=self.values.device)
        mixed = 1.0 + share * (self.values.clamp_min(0.0) - 1.0)
        return (self.vectors * mixed.sqrt()) @ self.vectors.T


def error_roots(
    model: nn.Module, batches: Sequence[Tensor], on_batches: Callable[[int, int], None] | None = None
) -> ErrorRoots:
    """What an error weighs in every layer, from some windows of each of the `batches` of tokens `(B, T)`.

    `on_batches(done, of)` is told how many of them have gone through the model.
    """
    layers = len(model.get_submodule(Shape.of(model).spec.layers))  # type: ignore[arg-type]
    return ErrorRoots(output_curvature(model, batches, on_batches), layers)


@torch.no_grad()
def output_curvature(
    model: nn.Module, batches: Sequence[Tensor], on_batches: Callable[[int, int], None] | None = None
) -> Tensor:
    """G `(hidden, hidden)` float64, scaled so that its diagonal's mean is 1.

    Raises ValueError without batches, RunError where the model overflows.
    """
    if not batches:
        raise ValueError("there is no calibration text to run")
    spec = Shape.of(model).spec
    unembedding: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    norm: Tensor = model.get_submodule(spec.norm).weight.double()  # type: ignore[operator, assignment]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    chance = torch.zeros(len(unembedding), device=unembedding.device)
    expected = torch.zeros(unembedding.shape[1], unembedding.shape[1], device=unembedding.device)
    tokens = 0
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    portions = BatchSplitter()
    for done, windows in enumerate(curvature_windows(batches)):
        if on_batches is not None:
            on_batches(done, len(batches))
        parts: list[Tensor] = []

        def run(some: slice, windows: Tensor = windows, parts: list[Tensor] = parts) -> None:
            parts.append(decoder(input_ids=windows[some].to(device), use_cache=False).last_hidden_state)

        portions.each(len(windows), run)
        for some in torch.cat(parts).flatten(0, 1).to(unembedding.device).split(LOGIT_ROWS):
            probability = (some @ unembedding.T).float().softmax(-1)
            chance += probability.sum(0)
            mean = (probability.to(unembedding.dtype) @ unembedding).float()
            expected += mean.T @ mean
            tokens += len(some)
    if on_batches is not None:
        on_batches(len(batches), len(batches))
    weighted = torch.zeros_like(expected)
    for part, some in zip(unembedding.split(LOGIT_ROWS * 16), chance.split(LOGIT_ROWS * 16), strict=True):
        weighted += (part.float() * some[:, None]).T @ part.float()
    curvature = (weighted - expected).double() / tokens
    curvature = norm[:, None] * curvature * norm
    if not curvature.isfinite().all():
        raise RunError("the logits on the calibration text are not finite; try dtype float32 or bfloat16")
    return curvature / curvature.diagonal().mean()
