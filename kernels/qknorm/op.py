"""qk_norm: the public function with its checks, registration, gradient, and inputs to try it with.

For shapes and equations see `definition.py`. An op may not return a view of what it is given, but v is one, and its
gradient belongs into the same packed tensor as those of q and k. So there are two ops: `qk_norm` returns q and k alone,
and `qk_norm_with_v`, which PyTorch takes apart wherever it traces (it has no kernel of its own), adds the view and the
gradient of all three.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from .._ops import ops
from ..common import checks
from ..common.registry import (
    LIBRARY,
    Context,
    Grad,
    Op,
    define,
    differentiate,
    forward_mode,
    new,
    no_forward_mode,
    statistic,
    zeros_if_none,
)
from ..common.trial import Draw, Inputs, Size
from . import definition

TRITON = __package__ + ".triton"
LAYOUTS = ("tokens", "heads")


def _check(op: str, qkv: Tensor, eps: float, qkv_bias: Optional[Tensor], layout: str, **vectors: Tensor) -> None:
    """qkv (B, N, 3, H, d), affine vectors (d,) of one dtype, and qkv's bias (3·H·d,)."""
    checks.packed(op, qkv)
    checks.floating(op, **vectors)
    for name, vector in vectors.items():
        checks.shape(op, name, vector, qkv.shape[-1:], "qkv's (d,)")
    checks.one_dtype(op, **vectors)
    checks.eps(op, eps)
    if qkv_bias is not None:
        checks.floating(op, qkv=qkv, qkv_bias=qkv_bias)
        checks.shape(op, "qkv_bias", qkv_bias, (qkv.shape[2:].numel(),), "qkv's (3·H·d,)")
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout = {layout!r}; one of {', '.join(LAYOUTS)} is needed")


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float = 1e-6,
    qkv_bias: Optional[Tensor] = None, layout: str = "tokens",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q and k normalised over head_dim, and v, each (B, H, N, d), from qkv (B, N, 3, H, d); gradients to all.

    With the layout "tokens" q and k are (B, N, H, d) in memory, as attention's output then is, and v is a view of qkv:
    nothing is copied, and the output is what the projection after it reads. With "heads" all three are contiguous.
    qkv_bias (3·H·d,) receives its gradient and nothing else (see the definition).
    """
    _check("qk_norm", qkv, eps, qkv_bias, layout, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    if qkv.dtype == torch.float64:
        return definition.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, qkv_bias, layout)
    heads_first = layout == "heads"
    q, k, v = ops.qk_norm_with_v(qkv, q_weight, q_bias, k_weight, k_bias, eps, qkv_bias, heads_first)
    return q, k, v.contiguous() if heads_first else v


def _fake(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float,
    heads_first: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, n, _, h, _ = qkv.shape
    q, k = (definition.empty_heads(qkv, heads_first) for _ in range(2))
    return q, k, statistic(qkv, (4, b, n, h))


def _backward_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, qkv_bias: Optional[Tensor],
    stats: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    nothing = q_weight.new_empty(0)
    return new(qkv), q_weight.new_empty((4, qkv.shape[-1])), nothing if qkv_bias is None else new(qkv_bias)


define(
    "qk_norm",
    "(Tensor qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, float eps,"
    " bool heads_first=False) -> (Tensor q, Tensor k, Tensor stats)",
    definition.qk_norm_forward,
    _fake,
    TRITON,
    unread=("qkv", 1 / 3),  # v
)
define(
    "qk_norm_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? qkv_bias, Tensor stats)"
    " -> (Tensor dqkv, Tensor daffine, Tensor dqkv_bias)",
    definition.qk_norm_backward,
    _backward_fake,
    TRITON,
    unread=("qkv", 1 / 3),  # v
)


def _v(qkv: Tensor) -> Tensor:
    return qkv.select(2, 2).transpose(1, 2)


def _gradients(ctx: Context, dq: Grad, dk: Grad, dv: Grad, bias_wanted: bool) -> tuple[Grad, ...]:
    """Those of qkv, the four vectors and qkv's bias."""
    qkv, q_weight, k_weight, qkv_bias, stats = ctx.saved_tensors
    dq, dk, dv = (zeros_if_none(grad, _v(qkv)) for grad in (dq, dk, dv))
    bias = qkv_bias if bias_wanted else None
    dqkv, daffine, dqkv_bias = ops.qk_norm_backward(dq, dk, dv, qkv, q_weight, k_weight, bias, stats)
    return (dqkv, *daffine.unbind(), dqkv_bias if bias_wanted else None)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, q_weight, _, k_weight, *_ = inputs
    stats = output[2]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, q_weight, k_weight, None, stats)


def _backward(ctx: Context, dq: Grad, dk: Grad, _stats: None) -> tuple[Grad, ...]:
    *grads, _ = _gradients(ctx, dq, dk, None, bias_wanted=False)
    return (*grads, None, None)


differentiate("qk_norm", _save, _backward)


class _WithV(torch.autograd.Function):
    """q and k of the op, and v, a view of qkv."""

    @staticmethod
    def forward(
        ctx: Context, qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor,
        qkv_bias: Optional[Tensor], eps: float, heads_first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, stats = ops.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, heads_first)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, q_weight, k_weight, qkv_bias, stats)
        return q, k, _v(qkv)

    @staticmethod
    def backward(ctx: Context, dq: Grad, dk: Grad, dv: Grad) -> tuple[Grad, ...]:
        return (*_gradients(ctx, dq, dk, dv, bias_wanted=ctx.needs_input_grad[5]), None, None)


def _with_v(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float,
    qkv_bias: Optional[Tensor], heads_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if forward_mode():
        raise no_forward_mode("qk_norm")
    differentiable = (qkv, q_weight, q_bias, k_weight, k_bias, qkv_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return _WithV.apply(*differentiable, eps, heads_first)
    q, k, _ = ops.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, heads_first)
    return q, k, _v(qkv)


LIBRARY.define(
    "qk_norm_with_v(Tensor(a) qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, float eps,"
    " Tensor? qkv_bias, bool heads_first) -> (Tensor q, Tensor k, Tensor(a) v)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.impl("qk_norm_with_v", _with_v, "CompositeImplicitAutograd")


def _try(draw: Draw, size: Size) -> Inputs:
    qkv = draw.leaf(size.batch, size.tokens, 3, size.heads, size.head)
    leaves = (qkv, *(draw.leaf(size.head) for _ in range(4)))
    # Attention's gradients have the layout of what it was given.
    grads = tuple(draw(size.batch, size.tokens, size.heads, size.head).transpose(1, 2) for _ in range(3))
    return Inputs((*leaves, 1e-6), leaves, grads)


DECLARED = {
    "qk_norm": Op(
        qk_norm, definition.qk_norm, _try,
        floor=(4, 8),  # read q, k, write q̂, k̂; read dq, dk, dv, q, k, write dqkv
        statistics=lambda size: 4 * size.heads,
        forms={"heads": partial(qk_norm, layout="heads")},
    ),
}  # fmt: skip
