"""Attention in plain PyTorch: the definitions, and below them the forms that are registered."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import up


def attention(qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens (arXiv 1706.03762), from the packed projection.

    qkv (B, N, 3, H, d). Returns (B, N, H, d) in qkv's dtype.
    """
    return attention_heads(*_heads(qkv)).transpose(1, 2)


def attention_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens: q, k, v (B, H, N, d) of one dtype → (B, H, N, d)."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """→ softmax(q·kᵀ/√d)·v as (B, N, H, d) in qkv's dtype, and the scores' log-sum-exp (B, H, N)."""
    return attention_heads_forward(*_heads(qkv))


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """→ dqkv (B, N, 3, H, d) in qkv's dtype."""
    grads = attention_heads_backward(dout, *_heads(qkv), out, lse)
    return torch.stack([grad.transpose(1, 2) for grad in grads], 2)


def attention_heads_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """→ softmax(q·kᵀ/√d)·v as (B, N, H, d) in q's dtype, and the scores' log-sum-exp (B, H, N)."""
    scores = up(q) @ up(k).transpose(-1, -2) / q.shape[-1] ** 0.5
    out = (scores.softmax(-1) @ up(v)).transpose(1, 2)
    return out.to(q.dtype).contiguous(), scores.logsumexp(-1)


def attention_heads_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dq, dk, dv (B, H, N, d) in q's dtype, in the order (B, N, H, d) in memory."""
    dy, y, scale = up(dout).transpose(1, 2), up(out).transpose(1, 2), q.shape[-1] ** -0.5
    p = (up(q) @ up(k).transpose(-1, -2) * scale - lse.unsqueeze(-1)).exp()
    ds = p * (dy @ up(v).transpose(-1, -2) - (dy * y).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (
        grad.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        for grad in (ds @ up(k), ds.transpose(-1, -2) @ up(q), p.transpose(-1, -2) @ dy)
    )
    return dq, dk, dv
