"""Attention in plain PyTorch: the definitions, and below them the forms that are registered."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import Lengths, up


def attention(qkv: Tensor, lengths: Lengths = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens (arXiv 1706.03762), from the packed projection.

    qkv (B, N, 3, H, d). Returns (B, N, H, d) in qkv's dtype. lengths: as in `attention_heads`.
    """
    return attention_heads(*_heads(qkv), lengths).transpose(1, 2)


def attention_heads(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over all tokens: q, k, v (B, H, N, d) of one dtype → (B, H, N, d).

    With `lengths` of groups of consecutive tokens, N in all, over those of a token's own group.
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    if lengths is None:
        return attend(q, k, v)
    return torch.cat([attend(q, k, v) for q, k, v in _cut(lengths, q, k, v)], 2)


def _cut(lengths: Lengths, *tensors: Tensor, dim: int = 2) -> list[tuple[Tensor, ...]]:
    """The tensors' parts that belong to each group; tokens lie along `dim`."""
    if lengths is None:
        return [tensors]
    return list(zip(*(tensor.split(list(lengths), dim) for tensor in tensors)))


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_forward(qkv: Tensor, lengths: Lengths = None) -> tuple[Tensor, Tensor]:
    """→ softmax(q·kᵀ/√d)·v as (B, N, H, d) in qkv's dtype, and the scores' log-sum-exp (B, H, N)."""
    return attention_heads_forward(*_heads(qkv), lengths)


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, lengths: Lengths = None) -> Tensor:
    """→ dqkv (B, N, 3, H, d) in qkv's dtype."""
    grads = attention_heads_backward(dout, *_heads(qkv), out, lse, lengths)
    return torch.stack([grad.transpose(1, 2) for grad in grads], 2)


def attention_heads_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths = None) -> tuple[Tensor, Tensor]:
    """→ softmax(q·kᵀ/√d)·v as (B, N, H, d) in q's dtype, and the scores' log-sum-exp (B, H, N)."""
    outs, sums = [], []
    for queries, keys, values in _cut(lengths, q, k, v):
        scores = up(queries) @ up(keys).transpose(-1, -2) / q.shape[-1] ** 0.5
        outs.append((scores.softmax(-1) @ up(values)).transpose(1, 2))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs, 1).to(q.dtype).contiguous(), torch.cat(sums, 2)


def attention_heads_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths = None
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dq, dk, dv (B, H, N, d) in q's dtype, in the order (B, N, H, d) in memory."""
    scale, found = q.shape[-1] ** -0.5, []
    heads = (up(dout).transpose(1, 2), up(out).transpose(1, 2), up(q), up(k), up(v), lse)
    for dy, y, queries, keys, values, sums in _cut(lengths, *heads):
        p = (queries @ keys.transpose(-1, -2) * scale - sums.unsqueeze(-1)).exp()
        ds = p * (dy @ values.transpose(-1, -2) - (dy * y).sum(-1, keepdim=True)) * scale
        found.append((ds @ keys, ds.transpose(-1, -2) @ queries, p.transpose(-1, -2) @ dy))
    dq, dk, dv = (torch.cat(grads, 2).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for grads in zip(*found))
    return dq, dk, dv
