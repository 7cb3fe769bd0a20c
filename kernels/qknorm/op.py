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
    Kind,
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
AFFINE = {"layer": ("q_weight", "q_bias", "k_weight", "k_bias"), "rms": ("q_weight", "k_weight"), "none": ()}
"""The vectors of each norm: all are given, or none is."""

Vector = Optional[Tensor]


def _check(
    op: str, qkv: Tensor, eps: float, qkv_bias: Vector, layout: str, norm: str, rope: Vector,
    vectors: dict[str, Vector],
) -> None:  # fmt: skip
    """qkv (B, N, 3, H, d), affine vectors (d,) of one dtype, qkv's bias (3·H·d,), and rope (1 or B, N, d) float32."""
    checks.packed(op, qkv)
    if norm not in AFFINE:
        raise ValueError(f"{op}: norm = {norm!r}; one of {', '.join(AFFINE)} is needed")
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    if given and tuple(given) != AFFINE[norm]:
        needed = f"{', '.join(AFFINE[norm])} or none" if AFFINE[norm] else "no vector"
        raise ValueError(f"{op}: norm = {norm!r} with {', '.join(given)}; {needed} is needed")
    if given:
        checks.floating(op, qkv=qkv, **given)
        for name, vector in given.items():
            checks.shape(op, name, vector, qkv.shape[-1:], "qkv's (d,)")
        checks.one_dtype(op, **given)
    checks.eps(op, eps)
    if qkv_bias is not None:
        checks.floating(op, qkv=qkv, qkv_bias=qkv_bias)
        checks.shape(op, "qkv_bias", qkv_bias, (qkv.shape[2:].numel(),), "qkv's (3·H·d,)")
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout = {layout!r}; one of {', '.join(LAYOUTS)} is needed")
    if rope is not None:
        _check_rope(op, qkv, rope)


def _check_rope(op: str, qkv: Tensor, rope: Tensor) -> None:
    """A table (1 or B, N, d), float32, without gradient, for pairs of qkv's channels."""
    checks.floating(op, qkv=qkv, rope=rope)
    if rope.dtype != torch.float32:
        raise TypeError(f"{op}: rope has dtype {rope.dtype}; torch.float32 is needed")
    b, n, *_, d = qkv.shape
    if d % 2:
        raise ValueError(f"{op}: rope turns pairs of channels, but qkv's d = {d}; an even d is needed")
    if tuple(rope.shape) not in ((1, n, d), (b, n, d)):
        raise ValueError(f"{op}: rope has shape {tuple(rope.shape)}; (1 or B, N, d) = (1 or {b}, {n}, {d}) is needed")
    checks.frozen(op, rope=rope)


def qk_norm(
    qkv: Tensor, q_weight: Vector = None, q_bias: Vector = None, k_weight: Vector = None, k_bias: Vector = None,
    eps: float = 1e-6, qkv_bias: Vector = None, layout: str = "tokens", norm: str = "layer", rope: Vector = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q and k normalised over head_dim and rotated, and v, each (B, H, N, d), from qkv (B, N, 3, H, d); gradients to
    all but rope.

    norm: "layer" (LayerNorm; the four vectors (d,), or none of them), "rms" (x / √(mean(x²) + eps); both weights or
    none, no biases) or "none" (no vectors). rope (1 or B, N, d), float32: the d/2 cosines of a token's angles and then
    their sines; pair i is the channels 2i and 2i + 1, and the same in all heads. None: no rotation.

    With the layout "tokens" q and k are (B, N, H, d) in memory, as attention's output then is, and v is a view of qkv:
    nothing is copied, and the output is what the projection after it reads. With "heads" all three are contiguous.
    qkv_bias (3·H·d,) receives its gradient and nothing else (see the definition).
    """
    vectors = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    _check("qk_norm", qkv, eps, qkv_bias, layout, norm, rope, vectors)
    if qkv.dtype == torch.float64:
        return definition.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, qkv_bias, layout, norm, rope)
    heads_first = layout == "heads"
    q, k, v = ops.qk_norm_with_v(qkv, q_weight, q_bias, k_weight, k_bias, eps, qkv_bias, heads_first, norm, rope)
    return q, k, v.contiguous() if heads_first else v


def _fake(
    qkv: Tensor, q_weight: Vector, q_bias: Vector, k_weight: Vector, k_bias: Vector, eps: float,
    heads_first: bool = False, norm: str = "layer", rope: Vector = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, n, _, h, _ = qkv.shape
    q, k = (definition.empty_heads(qkv, heads_first) for _ in range(2))
    return q, k, statistic(qkv, (definition.STATISTICS[norm], b, n, h))


def _backward_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Vector, k_weight: Vector, qkv_bias: Vector,
    stats: Tensor, norm: str = "layer", rope: Vector = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = qkv if q_weight is None else q_weight
    daffine = like.new_empty((definition.affine_gradients(norm, q_weight), qkv.shape[-1]))
    return new(qkv), daffine, like.new_empty(0) if qkv_bias is None else new(qkv_bias)


define(
    "qk_norm",
    "(Tensor qkv, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, float eps,"
    " bool heads_first=False, str norm='layer', Tensor? rope=None) -> (Tensor q, Tensor k, Tensor stats)",
    definition.qk_norm_forward,
    _fake,
    TRITON,
    unread=("qkv", 1 / 3),  # v
)
define(
    "qk_norm_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? qkv_bias, Tensor stats,"
    " str norm='layer', Tensor? rope=None) -> (Tensor dqkv, Tensor daffine, Tensor dqkv_bias)",
    definition.qk_norm_backward,
    _backward_fake,
    TRITON,
    unread=("qkv", 1 / 3),  # v
)


def _v(qkv: Tensor) -> Tensor:
    return qkv.select(2, 2).transpose(1, 2)


def _gradients(ctx: Context, dq: Grad, dk: Grad, dv: Grad, bias_wanted: bool) -> tuple[Grad, ...]:
    """Those of qkv, the four vectors and qkv's bias."""
    qkv, q_weight, k_weight, qkv_bias, stats, rope = ctx.saved_tensors
    dq, dk, dv = (zeros_if_none(grad, _v(qkv)) for grad in (dq, dk, dv))
    bias = qkv_bias if bias_wanted else None
    dqkv, daffine, dqkv_bias = ops.qk_norm_backward(
        dq, dk, dv, qkv, q_weight, k_weight, bias, stats, ctx.norm, rope
    )  # fmt: skip
    of_vectors = dict(zip(AFFINE[ctx.norm] if len(daffine) else (), daffine.unbind()))
    return (dqkv, *(of_vectors.get(name) for name in AFFINE["layer"]), dqkv_bias if bias_wanted else None)


def _save(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, q_weight, _, k_weight, *_ = inputs
    rest = dict(zip(("heads_first", "norm", "rope"), inputs[6:]))  # the dispatcher leaves out defaults at the end
    ctx.norm, rope, stats = rest.get("norm", "layer"), rest.get("rope"), output[2]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, q_weight, k_weight, None, stats, rope)


def _backward(ctx: Context, dq: Grad, dk: Grad, _stats: None) -> tuple[Grad, ...]:
    *grads, _ = _gradients(ctx, dq, dk, None, bias_wanted=False)
    return (*grads, None, None, None, None)


differentiate("qk_norm", _save, _backward)


class _WithV(torch.autograd.Function):
    """q and k of the op, and v, a view of qkv."""

    @staticmethod
    def forward(
        ctx: Context, qkv: Tensor, q_weight: Vector, q_bias: Vector, k_weight: Vector, k_bias: Vector,
        qkv_bias: Vector, eps: float, heads_first: bool, norm: str, rope: Vector,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, stats = ops.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, heads_first, norm, rope)
        ctx.norm = norm
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, q_weight, k_weight, qkv_bias, stats, rope)
        return q, k, _v(qkv)

    @staticmethod
    def backward(ctx: Context, dq: Grad, dk: Grad, dv: Grad) -> tuple[Grad, ...]:
        return (*_gradients(ctx, dq, dk, dv, bias_wanted=ctx.needs_input_grad[5]), None, None, None, None)


def _with_v(
    qkv: Tensor, q_weight: Vector, q_bias: Vector, k_weight: Vector, k_bias: Vector, eps: float,
    qkv_bias: Vector, heads_first: bool, norm: str = "layer", rope: Vector = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if forward_mode():
        raise no_forward_mode("qk_norm")
    differentiable = (qkv, q_weight, q_bias, k_weight, k_bias, qkv_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return _WithV.apply(*differentiable, eps, heads_first, norm, rope)
    q, k, _ = ops.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, heads_first, norm, rope)
    return q, k, _v(qkv)


LIBRARY.define(
    "qk_norm_with_v(Tensor(a) qkv, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, float eps,"
    " Tensor? qkv_bias, bool heads_first, str norm='layer', Tensor? rope=None) -> (Tensor q, Tensor k, Tensor(a) v)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.impl("qk_norm_with_v", _with_v, "CompositeImplicitAutograd")


def _try(draw: Draw, size: Size, norm: str = "layer", rotated: bool = False) -> Inputs:
    qkv = draw.leaf(size.batch, size.tokens, 3, size.heads, size.head)
    vectors = {name: draw.leaf(size.head) for name in AFFINE[norm]}
    # Attention's gradients have the layout of what it was given.
    grads = tuple(draw(size.batch, size.tokens, size.heads, size.head).transpose(1, 2) for _ in range(3))
    args: tuple[Any, ...] = (qkv, *map(vectors.get, AFFINE["layer"]), 1e-6)
    if norm != "layer" or rotated:
        angles = draw(1, size.tokens, size.head // 2, dtype=torch.float32)
        turned = rotated and size.head % 2 == 0  # with an odd head_dim a model has no rotation to be tried
        rope = torch.cat((angles.cos(), angles.sin()), -1) if turned else None
        args = (*args, None, "tokens", norm, rope)
    return Inputs(args, (qkv, *vectors.values()), grads)


def _kind(norm: str, rotated: bool, usual: str = "", floor: Optional[tuple[int, int]] = None) -> Kind:
    return Kind(
        partial(_try, norm=norm, rotated=rotated),
        statistics=lambda size: definition.STATISTICS[norm] * size.heads, usual=usual, floor=floor,
    )  # fmt: skip


def _contiguous(
    qkv: Tensor, q_weight: Optional[Tensor] = None, q_bias: Optional[Tensor] = None, k_weight: Optional[Tensor] = None,
    k_bias: Optional[Tensor] = None, eps: float = 1e-6, qkv_bias: Optional[Tensor] = None, layout: str = "heads",
    norm: str = "layer", rope: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`qk_norm` with the layout "heads", whichever is asked for."""
    return qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, qkv_bias, "heads", norm, rope)


DECLARED = {
    "qk_norm": Op(
        qk_norm, definition.qk_norm, _try,
        floor=(4, 8),  # read q, k, write q̂, k̂; read dq, dk, dv, q, k, write dqkv; a table is small beside them
        statistics=lambda size: definition.STATISTICS["layer"] * size.heads,
        forms={"heads": _contiguous},
        kinds={
            "with rope": _kind("layer", True),
            "rms": _kind("rms", False),
            "rms with rope": _kind("rms", True, usual="rms"),
            "rope alone": _kind("none", True, floor=(4, 6)),  # the gradient reads neither q nor k
        },
    ),
}  # fmt: skip
