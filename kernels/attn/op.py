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


def attention(qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v (B, N, H, d) from the packed projection (B, N, 3, H, d); its gradient comes packed too.

    csrc takes float32, and multiples of 32 for N and d; anything else is computed by plain PyTorch.
    """
    checks.packed("attention", qkv)
    if qkv.dtype != torch.float32 or qkv.shape[1] % 32 or qkv.shape[-1] % 32:
        return definition.attention(qkv)
    out: Tensor = ops.attention(qkv.contiguous())[0]
    return out


def _fake(qkv: Tensor) -> tuple[Tensor, ...]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), statistic(qkv, (b, h, n))


define("attention", "(Tensor qkv) -> (Tensor out, Tensor lse)", definition.attention_forward, _fake)
define(
    "attention_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse) -> Tensor",
    definition.attention_backward,
    lambda dout, qkv, out, lse: new(qkv),
)


def _save(ctx: Context, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Context, dout: Grad, _lse: None) -> Grad:
    return None if dout is None else ops.attention_backward(dout, *ctx.saved_tensors)


differentiate("attention", _save, _backward)

Shape = tuple[int, ...]


@register_flop_formula(ops.attention)
def _flops(qkv: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(qkv) // 3 * qkv[1]  # scores and outputs


@register_flop_formula(ops.attention_backward)
def _backward_flops(dout: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    return 10 * math.prod(dout) * dout[1]  # the scores once more, dV, dP, dQ, dK


DECLARED = {"attention": Op(attention, definition.attention)}
