"""Estimate the gradient of the expected loss with respect to θ from the losses of sampled masks."""

from __future__ import annotations

from torch import Tensor

BASELINE_RATE = 0.2
"""λ of the moving baseline δ ← (1 − λ)δ + λ·mean(L) (Gao et al. 2025, eq. 9)."""


def preconditioned_score(theta: Tensor, masks: Tensor) -> Tensor:
    """Return (m − θ) / √(θ(1 − θ)): `(K, n)`. Zero where θ is 0 or 1, because nothing is random there.

    The exact score ∇_θ log p_θ(m) divides by θ(1 − θ). The paper divides by its root, which preconditions the
    gradient by √(θ(1 − θ)): every entry then has variance 1, and nearly certain units do not explode.
    """
    deviation = (theta * (1.0 - theta)).sqrt()
    return ((masks.to(theta.dtype) - theta) / deviation).where(deviation > 0, 0.0)


def paper(theta: Tensor, masks: Tensor, losses: Tensor, baseline: float | None) -> tuple[Tensor, float]:
    """Return the gradient `(n,)` and the updated baseline of the paper's exact estimator (Gao et al. 2025).

    g = Σ_k (L_k − δ)·score_k / (K − 1), with δ moved by this step's mean *before* it is subtracted. Since δ holds λ/K
    of every L_k, E[g] = (K − λ)/(K − 1) · √(θ(1 − θ)) · ∇E[L]. Without a baseline yet, δ is this step's mean.
    """
    mean = float(losses.mean())
    moved = mean if baseline is None else (1.0 - BASELINE_RATE) * baseline + BASELINE_RATE * mean
    gradient = (losses - moved) @ preconditioned_score(theta, masks) / (len(losses) - 1)
    return gradient, moved


def rloo(theta: Tensor, masks: Tensor, losses: Tensor, baseline: float | None) -> tuple[Tensor, float]:
    """Return the gradient `(n,)` of REINFORCE with leave-one-out, and the mean loss. `baseline` is not used.

    Each mask's baseline is the mean loss of the others *on the same batch*, so the difficulty of the batch cancels; the
    paper's moving baseline leaves it in (Kool et al. 2019).
    g = Σ_k (L_k − mean_{j≠k} L_j)·score_k / K = Σ_k (L_k − mean L)·score_k / (K − 1), E[g] = √(θ(1 − θ)) · ∇E[L].
    """
    gradient = (losses - losses.mean()) @ preconditioned_score(theta, masks) / (len(losses) - 1)
    return gradient, float(losses.mean())


ESTIMATORS = {"paper": paper, "rloo": rloo}
