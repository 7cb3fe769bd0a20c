"""Queries and keys of attention in plain PyTorch, normalised over head_dim and rotated by their positions: the
definition, and below it the forms that the op registers."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..common.plain import norm_backward, up

STATISTICS = {"layer": 4, "rms": 2, "none": 0}
"""Of each norm, the numbers that the forward pass keeps of a token and head: mean and rstd of q and of k, or rstd."""


def rotate(x: Tensor, rope: Optional[Tensor], back: bool = False) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B, N, H, d), in x's dtype; x itself if rope is None.

    rope (1 or B, N, d) has a token's cosines, of each pair of channels (2i, 2i + 1), and then its sines. `back` turns
    the other way, which is the gradient.
    """
    if rope is None:
        return x
    cos, sin = rope.to(x.dtype).unsqueeze(2).chunk(2, -1)  # (1 or B, N, 1, d/2)
    sin = -sin if back else sin
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def _normalise(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float, norm: str) -> Tensor:
    """x (B, N, H, d) in the computing dtype, normalised over d."""
    weight, bias = (None if vector is None else up(vector) for vector in (weight, bias))
    if norm == "layer":
        return torch.nn.functional.layer_norm(up(x), x.shape[-1:], weight, bias, eps)
    if norm == "none":
        return up(x)
    h = up(x) * torch.rsqrt(up(x).square().mean(-1, keepdim=True) + eps)  # faster on a CPU than PyTorch's rms_norm
    return h if weight is None else h * weight


def qk_norm(
    qkv: Tensor, q_weight: Optional[Tensor] = None, q_bias: Optional[Tensor] = None,
    k_weight: Optional[Tensor] = None, k_bias: Optional[Tensor] = None, eps: float = 1e-6,
    qkv_bias: Optional[Tensor] = None, layout: str = "tokens", norm: str = "layer", rope: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q and k normalised over head_dim (arXiv 2302.05442), then rotated, read from the packed projection.

    qkv (B, N, 3, H, d); norm "layer" (LayerNorm), "rms" (x / √(mean(x²) + eps)) or "none"; weights and biases (d,), or
    None. rope (1 or B, N, d) float32: see `rotate`; None: no rotation. Returns q, k, v, each (B, H, N, d) in qkv's
    dtype: with the layout "tokens" in the order (B, N, H, d) in memory, v being a view of qkv; with "heads" all three
    contiguous.

    qkv_bias (3·H·d,), a bias that was added to qkv as a constant, only receives its gradient: the sum of qkv's over all
    tokens.
    """
    if qkv_bias is not None and qkv_bias.requires_grad:
        qkv = qkv + (qkv_bias - qkv_bias.detach()).view(qkv.shape[2:])
    q, k, v = qkv.unbind(2)
    q_hat = rotate(_normalise(q, q_weight, q_bias, eps, norm), rope).to(qkv.dtype)
    k_hat = rotate(_normalise(k, k_weight, k_bias, eps, norm), rope).to(qkv.dtype)
    q_hat, k_hat, v = (part.transpose(1, 2) for part in (q_hat, k_hat, v))
    return (q_hat, k_hat, v) if layout == "tokens" else (q_hat.contiguous(), k_hat.contiguous(), v.contiguous())


def empty_heads(qkv: Tensor, heads_first: bool) -> Tensor:
    """A new tensor (B, H, N, d) in qkv's dtype, contiguous if heads_first, otherwise (B, N, H, d) in memory."""
    b, n, _, h, d = qkv.shape
    if heads_first:
        return torch.empty((b, h, n, d), dtype=qkv.dtype, device=qkv.device)
    return torch.empty((b, n, h, d), dtype=qkv.dtype, device=qkv.device).transpose(1, 2)


def affine_gradients(norm: str, weight: Optional[Tensor]) -> int:
    """How many vectors get a gradient: weight and bias of q and of k, their weights, or none."""
    return 0 if weight is None else STATISTICS[norm]


def qk_norm_forward(
    qkv: Tensor, q_weight: Optional[Tensor], q_bias: Optional[Tensor], k_weight: Optional[Tensor],
    k_bias: Optional[Tensor], eps: float, heads_first: bool = False, norm: str = "layer",
    rope: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """→ q, k (B, H, N, d) in qkv's dtype, laid out as `empty_heads`; stats (4, B, N, H): mean and rstd of q, of k;
    with the norm "rms" (2, B, N, H): rstd of q, of k; with "none" (0, B, N, H)."""
    made, stats = [], []
    for x, weight, bias in ((qkv[:, :, 0], q_weight, q_bias), (qkv[:, :, 1], k_weight, k_bias)):
        if norm == "layer":
            w, b = (None if vector is None else up(vector) for vector in (weight, bias))
            hat, mean, rstd = torch.native_layer_norm(up(x), qkv.shape[-1:], w, b, eps)  # (B, N, H, d)
            stats += [mean.squeeze(-1), rstd.squeeze(-1)]
        else:
            hat = _normalise(x, weight, bias, eps, norm)
            if norm == "rms":
                stats.append((up(x).square().mean(-1) + eps).rsqrt())
        made.append(empty_heads(qkv, heads_first).copy_(rotate(hat, rope).transpose(1, 2)))
    return made[0], made[1], torch.stack(stats) if stats else up(qkv).new_empty((0, *qkv.shape[:2], qkv.shape[3]))


def qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Optional[Tensor], k_weight: Optional[Tensor],
    qkv_bias: Optional[Tensor], stats: Tensor, norm: str = "layer", rope: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """→ dqkv (B, N, 3, H, d) in qkv's dtype; daffine (4, d) in the weights': dq_weight, dq_bias, dk_weight, dk_bias;
    with the norm "rms" (2, d): dq_weight, dk_weight; without weights (0, d) in qkv's dtype; and qkv_bias's gradient in
    its dtype, which is empty if qkv_bias is None."""
    parts, sums = [], []
    for part, (dy, weight, of_part) in enumerate(zip((dq, dk), (q_weight, k_weight), stats.chunk(2))):
        dy = rotate(up(dy).transpose(1, 2), rope, back=True)
        if norm == "none":
            parts.append(dy)
            continue
        x, rstd = up(qkv[:, :, part]), of_part[-1]
        h = (x - of_part[0].unsqueeze(-1) if norm == "layer" else x) * rstd.unsqueeze(-1)
        parts.append(norm_backward(dy if weight is None else dy * up(weight), h, rstd, rms=norm == "rms"))
        if weight is not None:
            sums += [(dy * h).sum((0, 1, 2)), *([dy.sum((0, 1, 2))] if norm == "layer" else [])]
    exact = torch.stack([*parts, up(dv).transpose(1, 2)], 2)
    like = qkv if q_weight is None else q_weight
    daffine = torch.stack(sums).to(like.dtype) if sums else like.new_empty((0, qkv.shape[-1]))
    if qkv_bias is None:
        return exact.to(qkv.dtype), daffine, daffine.new_empty(0)
    return exact.to(qkv.dtype), daffine, exact.sum((0, 1)).flatten().to(qkv_bias.dtype)
