"""attention: the public function with its checks, registration, gradient and FLOPs.

csrc serves it on the CPU; on CUDA the backends of attention libraries do, and this op is its definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._ops import ops
from ..common import checks
from ..common.plain import Lengths
from ..common.registry import Context, Grad, Op, define, differentiate, new, statistic
from . import definition


def _served(x: Tensor) -> bool:
    """Whether csrc takes x (…, d)."""
    return x.dtype == torch.float32 and not x.shape[-1] % 32


def attention(qkv: Tensor, lengths: Lengths = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v (B, N, H, d) from the packed projection (B, N, 3, H, d); its gradient comes packed too.

    With `lengths` of groups of consecutive tokens, N in all, a token attends to its own group alone. csrc takes
    float32, and multiples of 32 for d; anything else is computed by plain PyTorch.
    """
    checks.packed("attention", qkv)
    if lengths is not None:
        checks.lengths("attention", lengths, qkv.shape[1])
    if not _served(qkv):
        return definition.attention(qkv, lengths)
    out: Tensor = ops.attention(qkv.contiguous(), lengths)[0]
    return out


def attention_heads(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v: q, k, v (B, H, N, d) of one dtype → (B, H, N, d); gradients to all. lengths: as above.

    The result and the gradients are (B, N, H, d) in memory. q, k and v may have any strides; only one whose channels do
    not lie side by side is copied. csrc takes what it takes in `attention`; anything else is computed by plain PyTorch.
    """
    checks.floating("attention_heads", q=q, k=k, v=v)
    checks.one_dtype("attention_heads", q=q, k=k, v=v)
    checks.rank("attention_heads", "q", q, "(B, H, N, d)")
    for name, tensor in (("k", k), ("v", v)):
        checks.shape("attention_heads", name, tensor, q.shape, "q's (B, H, N, d)")
    if lengths is not None:
        checks.lengths("attention_heads", lengths, q.shape[2])
    if not _served(q):
        return definition.attention_heads(q, k, v, lengths)
    out: Tensor = ops.attention_heads(q, k, v, lengths)[0]
    return out.transpose(1, 2)


def _fake(qkv: Tensor, lengths: Lengths = None) -> tuple[Tensor, ...]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), statistic(qkv, (b, h, n))


def _heads_fake(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths = None) -> tuple[Tensor, ...]:
    b, h, n, d = q.shape
    return q.new_empty((b, n, h, d)), statistic(q, (b, h, n))


def _heads_backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    b, h, n, d = q.shape
    return tuple(q.new_empty((b, n, h, d)).transpose(1, 2) for _ in range(3))


define(
    "attention",
    "(Tensor qkv, int[]? lengths=None) -> (Tensor out, Tensor lse)",
    definition.attention_forward,
    _fake,
)
define(
    "attention_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int[]? lengths=None) -> Tensor",
    definition.attention_backward,
    lambda dout, qkv, out, lse, lengths=None: new(qkv),
)
define(
    "attention_heads",
    "(Tensor q, Tensor k, Tensor v, int[]? lengths=None) -> (Tensor out, Tensor lse)",
    definition.attention_heads_forward,
    _heads_fake,
)
define(
    "attention_heads_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[]? lengths=None)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    definition.attention_heads_backward,
    _heads_backward_fake,
)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    tensors = [given for given in inputs if isinstance(given, Tensor)]
    ctx.lengths = inputs[len(tensors) :]  # the dispatcher leaves out lengths that are None
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Context, dout: Grad, _lse: None) -> tuple[Grad, ...]:
    grad = None if dout is None else ops.attention_backward(dout, *ctx.saved_tensors, *ctx.lengths)
    return (grad, *(None for _ in ctx.lengths))


def _heads_backward(ctx: Context, dout: Grad, _lse: None) -> tuple[Grad, ...]:
    none = (None, None, None)
    grads = none if dout is None else ops.attention_heads_backward(dout, *ctx.saved_tensors, *ctx.lengths)
    return (*grads, *(None for _ in ctx.lengths))


differentiate("attention", _save, _backward)
differentiate("attention_heads", _save, _heads_backward)

Shape = tuple[int, ...]


def _scores(tokens: int, rest: tuple[Any, ...]) -> int:
    """Scores of a head: of all pairs of tokens, or with lengths, which come last, of those in a group."""
    lengths = next((value for value in rest if isinstance(value, Sequence) and not isinstance(value, torch.Size)), None)
    return tokens**2 if lengths is None else sum(length**2 for length in lengths)


@register_flop_formula(ops.attention)
def _flops(qkv: Shape, *rest: Any, **__: Any) -> int:
    b, n, _, h, d = qkv
    return 4 * b * h * d * _scores(n, rest)  # scores and outputs


@register_flop_formula(ops.attention_heads)
def _heads_flops(q: Shape, k: Shape, v: Shape, *rest: Any, **__: Any) -> int:
    b, h, n, d = q
    return 4 * b * h * d * _scores(n, rest)


@register_flop_formula([ops.attention_backward, ops.attention_heads_backward])
def _backward_flops(dout: Shape, *rest: Any, **__: Any) -> int:
    b, n, h, d = dout
    return 10 * b * h * d * _scores(n, rest)  # the scores once more, dV, dP, dQ, dK


DECLARED = {
    "attention": Op(attention, definition.attention),
    "attention_heads": Op(attention_heads, definition.attention_heads),
}
