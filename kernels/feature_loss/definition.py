"""Feature losses and guidance in plain PyTorch: the definitions, and below them the forms that the ops register.

Everything is computed in float32 (float64 for float64); losses are returned in the computing dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import up

EPS_NORM = 1e-6
"""Lower bound of a vector's length (cosine) or RMS (normalized_mse): x / max(‖x‖, EPS_NORM)."""

FEATURE_LOSSES = ("mse", "cosine", "normalized_mse")


def cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """f_∅ + ω·(f_y − f_∅): classifier-free guidance (arXiv 2207.12598) applied to features of any shape."""
    null = up(f_null)
    return (null + cfg_scale * (up(f_cond) - null)).to(f_cond.dtype)


def _unit(x: Tensor) -> Tensor:
    """x / max(‖x‖, EPS_NORM) over the last axis; a zero vector stays zero."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(EPS_NORM**2).rsqrt()


def _per_sample_loss(q: Tensor, f: Tensor, loss: str) -> Tensor:
    """(M, N, D) → (M,): the feature loss of each sample."""
    if loss == "mse":
        return (q - f).square().mean((1, 2))
    if loss == "cosine":
        return -(_unit(q) * _unit(f)).sum(-1).mean(1)
    if loss == "normalized_mse":
        f = f * f.square().mean(-1, keepdim=True).clamp_min(EPS_NORM**2).rsqrt()
        return (q - f).square().mean((1, 2))
    raise ValueError(f"loss = {loss!r}: one of {', '.join(FEATURE_LOSSES)}")


def align(q: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """Patch-wise normalised cosine alignment of REPA (arXiv 2410.06940): Σ_b w_b · mean_n −cos(q_bn, f_bn).

    q, f (B, N, D); weight (B,) float32. Vectors are divided by max(‖·‖, EPS_NORM). Gradient to q only.
    Returns a scalar in the computing dtype.
    """
    losses = _per_sample_loss(up(q), up(f.detach()), "cosine")
    return (weight.to(losses.dtype) * losses).sum()


def guided_feature_loss(
    q: Tensor,
    f_cond: Tensor,
    f_null: Tensor,
    weight: Tensor,
    cfg_scale: float,
    loss: str = "mse",
    index: Tensor | None = None,
) -> Tensor:
    """Σ_m w_m · ℓ(q_m, f_m) with f = f_∅ + ω·(f_y − f_∅): the target of Self-Transcendence (arXiv 2601.07773).

    q (B, N, D) is the student's projection; f_cond, f_null (M, N, D) the frozen teacher's features; weight (M,).
    `index` (M,) int64, distinct, names the rows of q that are supervised; without it M = B and all are.
    ℓ is, by `loss`: "mse" mean_nd (q − f)²; "cosine" mean_n −cos(q_n, f_n); "normalized_mse" mean_nd (q − f/rms(f_n))²,
    the RMS of each token's own feature vector. Lengths and RMS are bounded below by EPS_NORM.
    Gradient to q only. M = 0 gives 0. Returns a scalar in the computing dtype.
    """
    rows = up(q) if index is None else up(q).index_select(0, index)
    null = up(f_null.detach())
    f = null + cfg_scale * (up(f_cond.detach()) - null)
    losses = _per_sample_loss(rows, f, loss)
    return (weight.to(losses.dtype) * losses).sum()


def _loss_and_gradient(q: Tensor, f: Tensor, weight: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Σ_m w_m·ℓ(q_m, f_m) and its gradient to q (M, N, D), both in the computing dtype of q and f."""
    losses = _per_sample_loss(q, f, loss)
    weight = weight.to(losses.dtype)
    if loss == "cosine":
        power = q.square().sum(-1, keepdim=True)
        inverse = power.clamp_min(EPS_NORM**2).rsqrt()
        cosine = (q * inverse * _unit(f)).sum(-1, keepdim=True)
        # Below the bound the length is a constant, so nothing is taken out along q.
        dq = -inverse * (_unit(f) - torch.where(power >= EPS_NORM**2, q * inverse * cosine, 0.0)) / q.shape[1]
    else:
        if loss == "normalized_mse":
            f = f * f.square().mean(-1, keepdim=True).clamp_min(EPS_NORM**2).rsqrt()
        dq = 2 * (q - f) / (q.shape[1] * q.shape[2])
    return (weight * losses).sum(), weight[:, None, None] * dq


def align_forward(q: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """→ loss, a scalar in the computing dtype, and dq in q's."""
    loss, dq = _loss_and_gradient(up(q), up(f), weight, "cosine")
    return loss, dq.to(q.dtype).contiguous()


def guided_feature_loss_forward(
    q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor, cfg_scale: float, loss: str, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ loss, a scalar in the computing dtype, and dq (B, N, D) in q's: zero in rows that `index` does not name."""
    rows = up(q) if index is None else up(q).index_select(0, index)
    null = up(f_null)
    value, drows = _loss_and_gradient(rows, null + cfg_scale * (up(f_cond) - null), weight, loss)
    if index is None:
        return value, drows.to(q.dtype).contiguous()
    dq = torch.zeros(q.shape, dtype=drows.dtype, device=q.device).index_add_(0, index, drows)
    return value, dq.to(q.dtype)


def cfg_extrapolate_forward(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """→ f_∅ + ω·(f_y − f_∅) in f_cond's dtype."""
    return cfg_extrapolate(f_cond, f_null, cfg_scale).contiguous()
