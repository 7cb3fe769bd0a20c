"""Every op of st_fast in plain PyTorch: the definition that the fused kernels are held to.

All functions compute in float32 (in float64 for float64 inputs, so that `gradcheck` applies) whatever
the inputs' dtype, and return the dtype of their first argument; losses are returned in the computing
dtype. Shapes: B samples, N tokens, D channels, H heads, d = D / H, M supervised samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS_NORM = 1e-6
"""Lower bound of a vector's length (cosine) or RMS (normalized_mse): x / max(‖x‖, EPS_NORM)."""

FEATURE_LOSSES = ("mse", "cosine", "normalized_mse")

NORM_CHUNK = 16384
"""Elements per partial sum of grad_norm: few enough that PyTorch sums them on one thread."""


def _up(x: Tensor) -> Tensor:
    """The computing dtype: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift, the adaLN of DiT (arXiv 2212.09748); LN has no affine.

    x (B, N, D); shift, scale (B, D), any strides. Returns (B, N, D) in x's dtype.
    """
    h = _up(x)
    h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps)
    return (h * (1 + _up(scale).unsqueeze(1)) + _up(shift).unsqueeze(1)).to(x.dtype)


def gate_residual(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """x + gate·a. x, a (B, N, D); gate (B, D). Returns (B, N, D) in x's dtype."""
    return (_up(x) + _up(gate).unsqueeze(1) * _up(a)).to(x.dtype)


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·a and y = LN(x')·(1 + scale) + shift; returns (x', y).

    x, a (B, N, D); gate, shift, scale (B, D). The statistics are those of x' as it is stored, in x's dtype.
    """
    x_out = gate_residual(x, a, gate)
    return x_out, norm_modulate(x_out, shift, scale, eps)


def cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """f_∅ + ω·(f_y − f_∅): classifier-free guidance (arXiv 2207.12598) applied to features of any shape."""
    null = _up(f_null)
    return (null + cfg_scale * (_up(f_cond) - null)).to(f_cond.dtype)


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
    losses = _per_sample_loss(_up(q), _up(f.detach()), "cosine")
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
    rows = _up(q) if index is None else _up(q).index_select(0, index)
    null = _up(f_null.detach())
    f = null + cfg_scale * (_up(f_cond.detach()) - null)
    losses = _per_sample_loss(rows, f, loss)
    return (weight.to(losses.dtype) * losses).sum()


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm with affine over head_dim of q and k, read from the packed projection (arXiv 2302.05442).

    qkv (B, N, 3, H, d); weights and biases (d,). Returns q, k, v, each (B, H, N, d) in qkv's dtype.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    shape = qkv.shape[-1:]
    q_hat = torch.nn.functional.layer_norm(_up(q), shape, _up(q_weight), _up(q_bias), eps)
    k_hat = torch.nn.functional.layer_norm(_up(k), shape, _up(k_weight), _up(k_bias), eps)
    return q_hat.to(qkv.dtype), k_hat.to(qkv.dtype), v


def attention(qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens (arXiv 1706.03762), from the packed projection.

    qkv (B, N, 3, H, d). Returns (B, N, H, d) in qkv's dtype.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·Wᵀ + bias over the last axis: x (…, K), weight (M, K), bias (M,), all of one dtype. Returns (…, M)."""
    return torch.nn.functional.linear(x, weight, bias)


def gelu_tanh(x: Tensor) -> Tensor:
    """½x·(1 + tanh(√(2/π)·(x + 0.044715x³))), GELU's tanh form (arXiv 1606.08415), any shape; in x's dtype."""
    return torch.nn.functional.gelu(_up(x), approximate="tanh").to(x.dtype)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The global L2 norm of a list of gradients, any shapes and floating dtypes: √ Σ g².

    Exact to float32: each chunk of NORM_CHUNK elements is summed in float64, and the chunks' sums in ascending order,
    so neither threads nor the order or grouping of the tensors changes a bit. Returns a 0-dim float32 tensor; an empty
    list gives 0. NaN and Inf come through.
    """
    if not grads:
        return torch.zeros(())
    chunks = [chunk.double().square().sum() for g in grads for chunk in g.reshape(-1).split(NORM_CHUNK)]
    return torch.stack(chunks).sort().values.cumsum(0)[-1].sqrt().float()


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    grad_norm: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    max_norm: float,
) -> None:
    """One AdamW step (arXiv 1711.05101) with clipping by the global norm, then ema += (1 − decay)·(p − ema), in place.

    The order of `torch.optim.AdamW`: p ← p·(1 − lr·wd); m, v; p ← p − lr/(1 − β₁ᵗ)·m / (√v/√(1 − β₂ᵗ) + eps), with g
    scaled by min(1, max_norm / (grad_norm + 1e-6)) as `clip_grad_norm_` does (max_norm ≤ 0: not scaled).
    params, exp_avgs, exp_avg_sqs and emas float32; grads float32 or bfloat16; `emas` and `copies` one per parameter or
    empty; copies receive the new parameter in their own dtype. step (0-dim) counts completed steps. If grad_norm is
    NaN or Inf nothing changes, step included. Reading grad_norm, step and lr waits for the device.
    """
    if not torch.isfinite(grad_norm):
        return
    step.add_(1)
    t, rate = float(step), float(lr)
    clip = min(1.0, max_norm / (float(grad_norm) + 1e-6)) if max_norm > 0 else 1.0
    root = (1 - beta2**t) ** 0.5
    for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        g = grads[i].to(p.dtype) * clip
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, (v.sqrt() / root).add_(eps), value=-rate / (1 - beta1**t))
        if emas:
            emas[i].lerp_(p, 1 - ema_decay)
        if copies:
            copies[i].copy_(p)
