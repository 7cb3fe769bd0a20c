"""LayerNorm of queries and keys in plain PyTorch: the definition, and below it the forms that the op registers."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..common.plain import norm_backward, up


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float = 1e-6,
    qkv_bias: Optional[Tensor] = None, layout: str = "tokens",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LayerNorm with affine over head_dim of q and k, read from the packed projection (arXiv 2302.05442).

    qkv (B, N, 3, H, d); weights and biases (d,). Returns q, k, v, each (B, H, N, d) in qkv's dtype: with the layout
    "tokens" in the order (B, N, H, d) in memory, v being a view of qkv; with "heads" all three contiguous.

    qkv_bias (3·H·d,), a bias that was added to qkv as a constant, only receives its gradient: the sum of qkv's over all
    tokens.
    """
    if qkv_bias is not None and qkv_bias.requires_grad:
        qkv = qkv + (qkv_bias - qkv_bias.detach()).view(qkv.shape[2:])
    q, k, v = qkv.unbind(2)
    shape = qkv.shape[-1:]
    q_hat = torch.nn.functional.layer_norm(up(q), shape, up(q_weight), up(q_bias), eps).to(qkv.dtype)
    k_hat = torch.nn.functional.layer_norm(up(k), shape, up(k_weight), up(k_bias), eps).to(qkv.dtype)
    q_hat, k_hat, v = (part.transpose(1, 2) for part in (q_hat, k_hat, v))
    return (q_hat, k_hat, v) if layout == "tokens" else (q_hat.contiguous(), k_hat.contiguous(), v.contiguous())


def empty_heads(qkv: Tensor, heads_first: bool) -> Tensor:
    """A new tensor (B, H, N, d) in qkv's dtype, contiguous if heads_first, otherwise (B, N, H, d) in memory."""
    b, n, _, h, d = qkv.shape
    if heads_first:
        return torch.empty((b, h, n, d), dtype=qkv.dtype, device=qkv.device)
    return torch.empty((b, n, h, d), dtype=qkv.dtype, device=qkv.device).transpose(1, 2)


def qk_norm_forward(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float,
    heads_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ q, k (B, H, N, d) in qkv's dtype, laid out as `empty_heads`; stats (4, B, N, H): mean and rstd of q, of k."""
    shape, made, stats = qkv.shape[-1:], [], []
    for x, weight, bias in ((qkv[:, :, 0], q_weight, q_bias), (qkv[:, :, 1], k_weight, k_bias)):
        hat, mean, rstd = torch.native_layer_norm(up(x), shape, up(weight), up(bias), eps)  # (B, N, H, d)
        made.append(empty_heads(qkv, heads_first).copy_(hat.transpose(1, 2)))
        stats += [mean.squeeze(-1), rstd.squeeze(-1)]
    return made[0], made[1], torch.stack(stats)


def qk_norm_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, qkv_bias: Optional[Tensor],
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """→ dqkv (B, N, 3, H, d) in qkv's dtype; daffine (4, d) in the weights': dq_weight, dq_bias, dk_weight, dk_bias;
    and qkv_bias's gradient in its dtype, which is empty if qkv_bias is None."""
    parts, sums = [], []
    for part, (dy, weight, (mean, rstd)) in enumerate(((dq, q_weight, stats[:2]), (dk, k_weight, stats[2:]))):
        dy = up(dy).transpose(1, 2)
        h = (up(qkv[:, :, part]) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        parts.append(norm_backward(dy * up(weight), h, rstd))
        sums += [(dy * h).sum((0, 1, 2)), dy.sum((0, 1, 2))]
    exact = torch.stack([*parts, up(dv).transpose(1, 2)], 2)
    daffine = torch.stack(sums).to(q_weight.dtype)
    if qkv_bias is None:
        return exact.to(qkv.dtype), daffine, daffine.new_empty(0)
    return exact.to(qkv.dtype), daffine, exact.sum((0, 1)).flatten().to(qkv_bias.dtype)
