"""The ops as the dispatcher knows them, in plain PyTorch: forwards that keep statistics, and gradients in closed form.

This serves every device without a kernel of its own (`CompositeExplicitAutograd`). The mathematics is that of
`reference.py`; signatures are the schemas of `registry.py`. Like there, computing is in float32 (float64 for float64).
Outputs are contiguous and never share memory with an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .reference import EPS_NORM, _per_sample_loss, _unit, _up


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """→ y (B, N, D) in x's dtype; mean and rstd (B, N) in the computing dtype."""
    h, mean, rstd = torch.native_layer_norm(_up(x), x.shape[-1:], None, None, eps)
    y = h * (1 + _up(scale).unsqueeze(1)) + _up(shift).unsqueeze(1)
    return y.to(x.dtype).contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def _norm_backward(dh: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    """The gradient through h = (x − mean)·rstd over the last axis."""
    return (dh - dh.mean(-1, keepdim=True) - h * (dh * h).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)


def norm_modulate_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """→ dx in x's dtype and the slab (B, 2D) = [dshift, dscale] in scale's."""
    h = (_up(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx = _norm_backward(_up(dy) * (1 + _up(scale).unsqueeze(1)), h, rstd)
    slab = torch.cat([_up(dy).sum(1), (_up(dy) * h).sum(1)], 1)
    return dx.to(x.dtype).contiguous(), slab.to(scale.dtype)


def gate_residual(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """→ x + gate·a in x's dtype."""
    return reference.gate_residual(x, a, gate).contiguous()


def gate_residual_backward(dx_out: Tensor, a: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """→ da in a's dtype, dgate (B, D) in gate's."""
    da = _up(dx_out) * _up(gate).unsqueeze(1)
    return da.to(a.dtype).contiguous(), (_up(dx_out) * _up(a)).sum(1).to(gate.dtype)


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ x' = x + gate·a, y, and the mean and rstd of x'."""
    x_out = gate_residual(x, a, gate)
    return x_out, *norm_modulate(x_out, shift, scale, eps)


def gate_residual_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, a: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dx, da and the slab (B, 3D) = [dgate, dshift, dscale] in scale's dtype."""
    h = (_up(x_out) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx = _up(dx_out) + _norm_backward(_up(dy) * (1 + _up(scale).unsqueeze(1)), h, rstd)
    slab = torch.cat([(dx * _up(a)).sum(1), _up(dy).sum(1), (_up(dy) * h).sum(1)], 1)
    da = (dx * _up(gate).unsqueeze(1)).to(a.dtype)
    return dx.to(x_out.dtype).contiguous(), da.contiguous(), slab.to(scale.dtype)


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


def align(q: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """→ loss, a scalar in the computing dtype, and dq in q's."""
    loss, dq = _loss_and_gradient(_up(q), _up(f), weight, "cosine")
    return loss, dq.to(q.dtype).contiguous()


def guided_feature_loss(
    q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor, cfg_scale: float, loss: str, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ loss, a scalar in the computing dtype, and dq (B, N, D) in q's: zero in rows that `index` does not name."""
    rows = _up(q) if index is None else _up(q).index_select(0, index)
    null = _up(f_null)
    value, drows = _loss_and_gradient(rows, null + cfg_scale * (_up(f_cond) - null), weight, loss)
    if index is None:
        return value, drows.to(q.dtype).contiguous()
    dq = torch.zeros(q.shape, dtype=drows.dtype, device=q.device).index_add_(0, index, drows)
    return value, dq.to(q.dtype)


def cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """→ f_∅ + ω·(f_y − f_∅) in f_cond's dtype."""
    return reference.cfg_extrapolate(f_cond, f_null, cfg_scale).contiguous()


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ q, k, v (B, H, N, d) in qkv's dtype; stats (4, B, H, N): mean and rstd of q, of k."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    shape = qkv.shape[-1:]
    q_hat, q_mean, q_rstd = torch.native_layer_norm(_up(q), shape, _up(q_weight), _up(q_bias), eps)
    k_hat, k_mean, k_rstd = torch.native_layer_norm(_up(k), shape, _up(k_weight), _up(k_bias), eps)
    stats = torch.stack([s.squeeze(-1) for s in (q_mean, q_rstd, k_mean, k_rstd)])
    v = v.clone(memory_format=torch.contiguous_format)
    return q_hat.to(qkv.dtype).contiguous(), k_hat.to(qkv.dtype).contiguous(), v, stats


def qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ dqkv (B, N, 3, H, d) in qkv's dtype, and dq_weight, dq_bias, dk_weight, dk_bias (d,) in the weights'."""
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    parts, sums = [], []
    for x, dy, weight, (mean, rstd) in ((q, dq, q_weight, stats[:2]), (k, dk, k_weight, stats[2:])):
        h = (_up(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        parts.append(_norm_backward(_up(dy) * _up(weight), h, rstd).to(qkv.dtype))
        sums += [(_up(dy) * h).sum((0, 1, 2)).to(weight.dtype), _up(dy).sum((0, 1, 2)).to(weight.dtype)]
    dqkv = torch.stack([*parts, dv.to(qkv.dtype)]).permute(1, 3, 0, 2, 4).contiguous()
    return dqkv, sums[0], sums[1], sums[2], sums[3]


def attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """→ softmax(q·kᵀ/√d)·v as (B, N, H, d) in qkv's dtype, and the scores' log-sum-exp (B, H, N)."""
    q, k, v = _up(qkv).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return out.to(qkv.dtype).contiguous(), scores.logsumexp(-1)


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """→ dqkv (B, N, 3, H, d) in qkv's dtype."""
    q, k, v = _up(qkv).permute(2, 0, 3, 1, 4).unbind(0)
    dy, y, scale = _up(dout).transpose(1, 2), _up(out).transpose(1, 2), qkv.shape[-1] ** -0.5
    p = (q @ k.transpose(-1, -2) * scale - lse.unsqueeze(-1)).exp()
    ds = p * (dy @ v.transpose(-1, -2) - (dy * y).sum(-1, keepdim=True)) * scale
    parts = torch.stack((ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy))
    return parts.permute(1, 3, 0, 2, 4).to(qkv.dtype).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """→ x·Wᵀ + bias (…, M), contiguous."""
    return reference.linear(x, weight, bias).contiguous()


def weight_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """→ dweight (M, K) and dbias (M,) of a linear layer."""
    rows = dy.reshape(-1, dy.shape[-1])  # (R, M)
    return rows.t() @ x.reshape(-1, x.shape[-1]), dy.sum(tuple(range(dy.dim() - 1)))


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ dx (…, K), dweight (M, K), dbias (M,), each in the layer's dtype."""
    return (dy @ weight).contiguous(), *weight_gradients(dy, x, weight)


def gelu_tanh(x: Tensor) -> Tensor:
    """→ GELU's tanh form in x's dtype."""
    return torch.nn.functional.gelu(_up(x), approximate="tanh").to(x.dtype).contiguous()


def gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    """→ dx in x's dtype."""
    return torch.ops.aten.gelu_backward(_up(dy), _up(x), approximate="tanh").to(x.dtype).contiguous()
