"""How much an error in each direction of the residual stream raises the loss, from forward passes only.

To second order, an error e in the normalised stream before the unembedding U changes the loss by ½ eᵀG e, on average
over what the model itself would predict, with G = E[Uᵀ (diag p − p pᵀ) U] and the final norm's weights on both sides.
That is the Gauss-Newton matrix of the loss at the last layer, in closed form. If the logits are soft-capped, their
slopes multiply the rows of U. An error of a late layer reaches the unembedding nearly unchanged through the residual
stream, while one of an early layer is transformed by everything after it. So late layers are judged mostly by G, and
the first half of the layers by the length of the error alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.errors import RunError
from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.gram import cholesky
from pgprune_cli.model.prunable import PrunableModel

SHARE = 0.7
"""Weight of G in the last layer's mixture with the identity. It falls linearly to 0 at the middle layer."""

WINDOWS = 16
"""How many windows of the calibration text the average is taken over."""

LOGIT_ROWS = 256
"""Positions whose logits exist at the same time."""


def curvature_windows(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return WINDOWS windows, spread over the batches `(B, T)`, or all if there are fewer: what the average is over.

    Windows of the same length are in one batch, as far as that holds no more tokens than the largest of the others.
    """
    windows = [window for batch in batches for window in batch]
    count = min(WINDOWS, len(windows))
    chosen = [windows[index * len(windows) // count] for index in range(count)]
    lengths = dict.fromkeys(map(len, chosen))
    most = max((batch.numel() for batch in batches), default=0)
    return [
        part
        for length in lengths
        for part in torch.stack([window for window in chosen if len(window) == length]).split(max(1, most // length))
    ]


class ErrorRoots:
    """For each layer a matrix R `(hidden, hidden)` float32: an output error e costs ‖R e‖².

    RᵀR is the layer's mixture of G and the identity. R exists only while somebody uses it.
    """

    def __init__(self, curvature: Tensor, layers: int) -> None:
        self.layers, self.device = layers, curvature.device
        self.curvature = curvature.float().cpu()  # a search keeps it

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, layer: int) -> Tensor:
        if not 0 <= layer < self.layers:
            raise IndexError(layer)
        share = SHARE * max(0.0, 2 * layer / max(1, self.layers - 1) - 1)
        if not share:
            return torch.eye(len(self.curvature), device=self.device)
        mixture = share * self.curvature.to(self.device)
        mixture.diagonal().add_(1.0 - share)
        return cholesky(mixture).T


def error_roots(
    model: PrunableModel, batches: Sequence[Tensor], progress: LayerProgress = NO_PROGRESS, ranks: Ranks = ALONE
) -> ErrorRoots:
    """Return the weight of an error in every layer, from WINDOWS windows spread over the `batches` `(B, T)`."""
    return ErrorRoots(output_curvature(model, batches, progress, ranks), model.shape.layers)


@torch.no_grad()
def output_curvature(
    model: PrunableModel, batches: Sequence[Tensor], progress: LayerProgress = NO_PROGRESS, ranks: Ranks = ALONE
) -> Tensor:
    """Return G `(hidden, hidden)` float64, scaled so that the mean of its diagonal is 1.

    ranks: of the processes that call this alike, and share the passes. Raises ValueError without batches, RunError if
    the model overflows.
    """
    if not batches:
        raise ValueError("there is no calibration text to run")
    unembedding = model.head.weight
    norm = model.family.norm_weight(model.final_norm).double()
    token_mass = torch.zeros(len(unembedding), device=unembedding.device)
    expected = torch.zeros(unembedding.shape[1], unembedding.shape[1], device=unembedding.device)
    tokens = 0
    splitter = BatchSplitter()
    parts = curvature_windows(batches)
    shapes = [(part.numel(), unembedding.shape[1]) for part in parts]
    states = ranks.divide(lambda index: _hidden_states(model, parts[index], splitter), shapes, model.dtype)
    progress.batches_done(0, len(parts))
    for done, hidden_states in enumerate(states, 1):
        for rows in hidden_states.to(unembedding.device).split(LOGIT_ROWS):
            logits = model.family.finish_logits(model.config, rows @ unembedding.T).float()
            probability, slopes = logits.softmax(-1), model.family.logit_slopes(model.config, logits)
            sensitivity = probability if slopes is None else probability * slopes
            token_mass += (sensitivity if slopes is None else sensitivity * slopes).sum(0)
            mean = (sensitivity.to(unembedding.dtype) @ unembedding).float()
            expected += mean.T @ mean
            tokens += len(rows)
        progress.batches_done(done, len(parts))
    weighted = torch.zeros_like(expected)
    for rows, mass in zip(unembedding.split(LOGIT_ROWS * 16), token_mass.split(LOGIT_ROWS * 16), strict=True):
        weighted += (rows.float() * mass[:, None]).T @ rows.float()
    curvature = (weighted - expected).double() / tokens
    curvature = norm[:, None] * curvature * norm
    if not curvature.isfinite().all():
        raise RunError("the logits on the calibration text are not finite. Try dtype float32 or bfloat16.")
    return curvature / curvature.diagonal().mean()


def _hidden_states(model: PrunableModel, windows: Tensor, splitter: BatchSplitter) -> Tensor:
    """Return the hidden states `(B · T, hidden)` before the unembedding."""
    parts: list[Tensor] = []

    def run(part: slice) -> None:
        parts.append(model.decoder(input_ids=windows[part].to(model.device), use_cache=False).last_hidden_state)

    splitter.run_slices(len(windows), run)
    return torch.cat(parts).flatten(0, 1)
