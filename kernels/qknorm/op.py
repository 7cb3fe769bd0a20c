"""qk_norm: the public function with its checks, registration, gradient, and inputs to try it with.

For shapes and equations see `definition.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..common import checks
from ..common.registry import Context, Grad, Op, define, differentiate, new, statistic, zeros_if_none
from ..common.trial import Draw, Inputs, Size
from . import definition

TRITON = __package__ + ".triton"


def _check(op: str, qkv: Tensor, eps: float, **vectors: Tensor) -> None:
    """qkv (B, N, 3, H, d) and affine vectors (d,), all of one dtype."""
    checks.packed(op, qkv)
    checks.floating(op, **vectors)
    for name, vector in vectors.items():
        checks.shape(op, name, vector, qkv.shape[-1:], "qkv's (d,)")
    checks.one_dtype(op, **vectors)
    checks.eps(op, eps)


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised over head_dim, and v, contiguous (B, H, N, d), from qkv (B, N, 3, H, d); gradients to all."""
    _check("qk_norm", qkv, eps, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    if qkv.dtype == torch.float64:
        return definition.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps)
    q, k, v, _ = ops.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps)
    return q, k, v


def _fake(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    b, n, _, h, d = qkv.shape
    q, k, v = (qkv.new_empty((b, h, n, d)) for _ in range(3))
    return q, k, v, statistic(qkv, (4, b, h, n))


define(
    "qk_norm",
    "(Tensor qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, float eps)"
    " -> (Tensor q, Tensor k, Tensor v, Tensor stats)",
    definition.qk_norm_forward,
    _fake,
    TRITON,
)
define(
    "qk_norm_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor stats)"
    " -> (Tensor dqkv, Tensor dq_weight, Tensor dq_bias, Tensor dk_weight, Tensor dk_bias)",
    definition.qk_norm_backward,
    lambda dq, dk, dv, qkv, q_weight, k_weight, stats: (
        new(qkv), new(q_weight), new(q_weight), new(k_weight), new(k_weight)
    ),
    TRITON,
    unread=("qkv", 1 / 3),  # v
)  # fmt: skip


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, q_weight, _, k_weight, _, _ = inputs
    stats = output[3]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, q_weight, k_weight, stats)


def _backward(ctx: Context, dq: Grad, dk: Grad, dv: Grad, _stats: None) -> tuple[Grad, ...]:
    saved = ctx.saved_tensors
    like = saved[0][:, :, 0].transpose(1, 2)  # (B, H, N, d)
    grads = [zeros_if_none(grad, like) for grad in (dq, dk, dv)]
    return (*ops.qk_norm_backward(*grads, *saved), None)


differentiate("qk_norm", _save, _backward)


def _try(draw: Draw, size: Size) -> Inputs:
    qkv = draw.leaf(size.batch, size.tokens, 3, size.heads, size.head)
    leaves = (qkv, *(draw.leaf(size.head) for _ in range(4)))
    grads = tuple(draw(size.batch, size.heads, size.tokens, size.head) for _ in range(3))
    return Inputs((*leaves, 1e-6), leaves, grads)


DECLARED = {
    "qk_norm": Op(
        qk_norm, definition.qk_norm, _try,
        floor=(6, 8),  # read qkv, write q, k, v; read dq, dk, dv, q, k, write dqkv
        statistics=lambda size: 4 * size.heads,
    ),
}  # fmt: skip
