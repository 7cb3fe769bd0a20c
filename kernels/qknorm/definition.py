"""LayerNorm of queries and keys in plain PyTorch: the definition, and below it the forms that the op registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import norm_backward, up


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm with affine over head_dim of q and k, read from the packed projection (arXiv 2302.05442).

    qkv (B, N, 3, H, d); weights and biases (d,). Returns q, k, v, each (B, H, N, d) in qkv's dtype.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    shape = qkv.shape[-1:]
    q_hat = torch.nn.functional.layer_norm(up(q), shape, up(q_weight), up(q_bias), eps)
    k_hat = torch.nn.functional.layer_norm(up(k), shape, up(k_weight), up(k_bias), eps)
    return q_hat.to(qkv.dtype), k_hat.to(qkv.dtype), v


def qk_norm_forward(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ q, k, v (B, H, N, d) in qkv's dtype; stats (4, B, H, N): mean and rstd of q, of k."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    shape = qkv.shape[-1:]
    q_hat, q_mean, q_rstd = torch.native_layer_norm(up(q), shape, up(q_weight), up(q_bias), eps)
    k_hat, k_mean, k_rstd = torch.native_layer_norm(up(k), shape, up(k_weight), up(k_bias), eps)
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
        h = (up(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        parts.append(norm_backward(up(dy) * up(weight), h, rstd).to(qkv.dtype))
        sums += [(up(dy) * h).sum((0, 1, 2)).to(weight.dtype), up(dy).sum((0, 1, 2)).to(weight.dtype)]
    dqkv = torch.stack([*parts, dv.to(qkv.dtype)]).permute(1, 3, 0, 2, 4).contiguous()
    return dqkv, sums[0], sums[1], sums[2], sums[3]
