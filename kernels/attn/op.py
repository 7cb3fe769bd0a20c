"""attention: the public function with its checks, registration, gradient and FLOPs.

csrc serves it on the CPU; on CUDA the backends of attention libraries do, and this op is its definition.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._ops import ops
from ..common import checks
from ..common.registry import Context, Grad, Op, define, differentiate, new, statistic
from . import definition


def _served(x: Tensor) -> bool:
    """Whether csrc takes x (…, d)."""
    return x.dtype == torch.float32 and not x.shape[-1] % 32


def attention(qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v (B, N, H, d) from the packed projection (B, N, 3, H, d); its gradient comes packed too.

    csrc takes float32, and multiples of 32 for d; anything else is computed by plain PyTorch.
    """
    checks.packed("attention", qkv)
    if not _served(qkv):
        return definition.attention(qkv)
    out: Tensor = ops.attention(qkv.contiguous())[0]
    return out


def attention_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v: q, k, v (B, H, N, d) of one dtype → (B, H, N, d); gradients to all.

    The result and the gradients are (B, N, H, d) in memory. q, k and v may have any strides; only one whose channels do
    not lie side by side is copied. csrc takes what it takes in `attention`; anything else is computed by plain PyTorch.
    """
    checks.floating("attention_heads", q=q, k=k, v=v)
    checks.one_dtype("attention_heads", q=q, k=k, v=v)
    checks.rank("attention_heads", "q", q, "(B, H, N, d)")
    for name, tensor in (("k", k), ("v", v)):
        checks.shape("attention_heads", name, tensor, q.shape, "q's (B, H, N, d)")
    if not _served(q):
        return definition.attention_heads(q, k, v)
    out: Tensor = ops.attention_heads(q, k, v)[0]
    return out.transpose(1, 2)


def _fake(qkv: Tensor) -> tuple[Tensor, ...]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), statistic(qkv, (b, h, n))


def _heads_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    b, h, n, d = q.shape
    return q.new_empty((b, n, h, d)), statistic(q, (b, h, n))


def _heads_backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    b, h, n, d = q.shape
    return tuple(q.new_empty((b, n, h, d)).transpose(1, 2) for _ in range(3))


define("attention", "(Tensor qkv) -> (Tensor out, Tensor lse)", definition.attention_forward, _fake)
define(
    "attention_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse) -> Tensor",
    definition.attention_backward,
    lambda dout, qkv, out, lse: new(qkv),
)
define(
    "attention_heads",
    "(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor lse)",
    definition.attention_heads_forward,
    _heads_fake,
)
define(
    "attention_heads_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor dq, Tensor dk, Tensor dv)",
    definition.attention_heads_backward,
    _heads_backward_fake,
)


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Context, dout: Grad, _lse: None) -> Grad:
    return None if dout is None else ops.attention_backward(dout, *ctx.saved_tensors)


def _heads_backward(ctx: Context, dout: Grad, _lse: None) -> tuple[Grad, ...]:
    return (None, None, None) if dout is None else ops.attention_heads_backward(dout, *ctx.saved_tensors)


differentiate("attention", _save, _backward)
differentiate("attention_heads", _save, _heads_backward)

Shape = tuple[int, ...]


@register_flop_formula(ops.attention)
def _flops(qkv: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(qkv) // 3 * qkv[1]  # scores and outputs


@register_flop_formula(ops.attention_heads)
def _heads_flops(q: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(q) * q[2]


@register_flop_formula([ops.attention_backward, ops.attention_heads_backward])
def _backward_flops(dout: Shape, *_: Any, **__: Any) -> int:
    return 10 * math.prod(dout) * dout[1]  # the scores once more, dV, dP, dQ, dK


DECLARED = {
    "attention": Op(attention, definition.attention),
    "attention_heads": Op(attention_heads, definition.attention_heads),
}
