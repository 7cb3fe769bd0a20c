"""Attention from the packed projection in plain PyTorch: the definition, and below it the form that is registered."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import up


def attention(qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens (arXiv 1706.03762), from the packed projection.

    qkv (B, N, 3, H, d). Returns (B, N, H, d) in qkv's dtype.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """→ softmax(q·kᵀ/√d)·v as (B, N, H, d) in qkv's dtype, and the scores' log-sum-exp (B, H, N)."""
    q, k, v = up(qkv).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return out.to(qkv.dtype).contiguous(), scores.logsumexp(-1)


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """→ dqkv (B, N, 3, H, d) in qkv's dtype."""
    q, k, v = up(qkv).permute(2, 0, 3, 1, 4).unbind(0)
    dy, y, scale = up(dout).transpose(1, 2), up(out).transpose(1, 2), qkv.shape[-1] ** -0.5
    p = (q @ k.transpose(-1, -2) * scale - lse.unsqueeze(-1)).exp()
    ds = p * (dy @ v.transpose(-1, -2) - (dy * y).sum(-1, keepdim=True)) * scale
    parts = torch.stack((ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy))
    return parts.permute(1, 3, 0, 2, 4).to(qkv.dtype).contiguous()
