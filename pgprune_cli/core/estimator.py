"""From the losses of sampled masks to a direction for θ. Baselines are values in and values out."""

from __future__ import annotations

from torch import Tensor

BASELINE_RATE = 0.2
"""λ of the moving baseline δ ← (1 − λ)δ + λ·mean(L) (Gao et al. 2025, eq. 9)."""


def preconditioned_score(theta: Tensor, masks: Tensor) -> Tensor:
    """(m − θ) / √(θ(1 − θ)): `(K, n)`. Zero where θ is 0 or 1, where nothing is random.

    The exact score ∇_θ log p_θ(m) divides by θ(1 − θ). The paper divides by its root, which preconditions the
    gradient by √(θ(1 − θ)): every entry then has variance 1, and nearly certain units do not explode.
    """
    deviation = (theta * (1.0 - theta)).sqrt()
    return ((masks.to(theta.dtype) - theta) / deviation).where(deviation > 0, 0.0)


def paper(theta: Tensor, masks: Tensor, losses: Tensor, baseline: float | None) -> tuple[Tensor, float]:
    """The paper's estimator, exactly (Gao et al. 2025): gradient `(n,)` and the moved baseline.

    g = Σ_k (L_k − δ)·score_k / (K − 1), with δ moved by this step's mean *before* it is subtracted. Since δ holds λ/K
    of every L_k, E[g] = (K − λ)/(K − 1) · √(θ(1 − θ)) · ∇E[L]. Without a baseline yet, δ is this step's mean.
    """
    mean = float(losses.mean())
    moved = mean if baseline is None else (1.0 - BASELINE_RATE) * baseline + BASELINE_RATE * mean
    gradient = (losses - moved) @ preconditioned_score(theta, masks) / (len(losses) - 1)
    return gradient, moved


def rloo(theta: Tensor, masks: Tensor, losses: Tensor, baseline: float | None) -> tuple[Tensor, float]:
    """REINFORCE with leave-one-out: each mask's baseline is the mean loss of the others *on the same batch*.

    g = Σ_k (L_k − mean_{j≠k} L_j)·score_k / K = Σ_k (L_k − mean L)·score_k / (K − 1), E[g] = √(θ(1 − θ)) · ∇E[L]
    (Kool et al. 2019). The difficulty of the batch cancels; a moving baseline leaves it in. `baseline` is only watched.
    """
    gradient = (losses - losses.mean()) @ preconditioned_score(theta, masks) / (len(losses) - 1)
    return gradient, float(losses.mean())


ESTIMATORS = {"paper": paper, "rloo": rloo}
