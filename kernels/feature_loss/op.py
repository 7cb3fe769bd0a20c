"""The feature losses and guidance: public functions with their checks, registration, gradients, and inputs to try them.

The losses make their gradient to q in the forward pass. For shapes and equations see `definition.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..common import checks
from ..common.registry import Context, Grad, Op, define, differentiate, new, no_second_derivative, statistic
from ..common.trial import CFG_SCALE, Draw, Inputs, Size
from . import definition

TRITON = __package__ + ".triton"


def _check_features(op: str, q: Tensor, weight: Tensor, **frozen: Tensor) -> None:
    """Frozen features (M, N, D) and weights (M,) for q (B, N, D)."""
    checks.floating(op, q=q, **frozen, weight=weight)
    checks.rank(op, "q", q, "(B, N, D)")
    first = next(iter(frozen))
    for name, f in frozen.items():
        checks.rank(op, name, f, "(M, N, D)")
        checks.shape(op, name, f, (frozen[first].shape[0], *q.shape[1:]), "(M, N, D), with q's N and D,")
    checks.shape(op, "weight", weight, frozen[first].shape[:1], f"{first}'s (M,)")
    checks.frozen(op, weight=weight, **frozen)


def _check_cfg_scale(op: str, cfg_scale: float) -> None:
    if not -math.inf < cfg_scale < math.inf:
        raise ValueError(f"{op}: cfg_scale = {cfg_scale}; a finite number is needed")


def _check_guided(
    op: str, q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor, cfg_scale: float, loss: str,
    index: Tensor | None,
) -> None:  # fmt: skip
    """One pair of features for every q, or for those that `index` names."""
    _check_features(op, q, weight, f_cond=f_cond, f_null=f_null)
    _check_cfg_scale(op, cfg_scale)
    if loss not in definition.FEATURE_LOSSES:
        raise ValueError(f"{op}: loss = {loss!r}; one of {', '.join(definition.FEATURE_LOSSES)} is needed")
    if index is None:
        checks.shape(op, "f_cond", f_cond, q.shape, "q's (B, N, D), as there is no index,")
        return
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index has dtype {index.dtype}; torch.int64 is needed")
    if index.device != q.device:
        raise ValueError(f"{op}: index is on {index.device}; it must be on q's device, {q.device}")
    checks.shape(op, "index", index, f_cond.shape[:1], "f_cond's (M,)")
    if index.shape[0] > q.shape[0]:
        raise ValueError(f"{op}: index names {index.shape[0]} samples; q has {q.shape[0]}, and they must be distinct")


def _wide_enough(q: Tensor) -> Tensor:
    """float16 q as float32: the gradient is made in the forward pass, before any loss scale, and float16 has no room
    for its 1/(B·N·D)."""
    return q.float() if q.dtype == torch.float16 else q


def align(q: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """Σ_b w_b · mean_n −cos(q_bn, f_bn), a float32 scalar; gradient to q, made in the forward pass."""
    _check_features("align", q, weight, f=f)
    checks.shape("align", "f", f, q.shape, "q's (B, N, D)")
    if q.dtype == torch.float64:
        return definition.align(q, f, weight)
    loss: Tensor = ops.align(_wide_enough(q), f, weight)[0]
    return loss


def guided_feature_loss(
    q: Tensor,
    f_cond: Tensor,
    f_null: Tensor,
    weight: Tensor,
    cfg_scale: float,
    loss: str = "mse",
    index: Tensor | None = None,
) -> Tensor:
    """Σ_m w_m · ℓ(q_m, f_∅ + ω·(f_y − f_∅)), a float32 scalar; gradient to q, made in the forward pass."""
    _check_guided("guided_feature_loss", q, f_cond, f_null, weight, cfg_scale, loss, index)
    if q.dtype == torch.float64:
        return definition.guided_feature_loss(q, f_cond, f_null, weight, cfg_scale, loss, index)
    value: Tensor = ops.guided_feature_loss(_wide_enough(q), f_cond, f_null, weight, cfg_scale, loss, index)[0]
    return value


def cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """f_∅ + ω·(f_y − f_∅) in f_cond's dtype and shape; gradients to both."""
    checks.floating("cfg_extrapolate", f_cond=f_cond, f_null=f_null)
    checks.shape("cfg_extrapolate", "f_null", f_null, f_cond.shape, "f_cond's shape")
    _check_cfg_scale("cfg_extrapolate", cfg_scale)
    if f_cond.dtype == torch.float64:
        return definition.cfg_extrapolate(f_cond, f_null, cfg_scale)
    f: Tensor = ops.cfg_extrapolate(f_cond, f_null, cfg_scale)
    return f


define(
    "align",
    "(Tensor q, Tensor f, Tensor weight) -> (Tensor loss, Tensor dq)",
    definition.align_forward,
    lambda q, f, weight: (statistic(q, ()), new(q)),
    TRITON,
)
define(
    "guided_feature_loss",
    "(Tensor q, Tensor f_cond, Tensor f_null, Tensor weight, float cfg_scale, str loss, Tensor? index)"
    " -> (Tensor loss, Tensor dq)",
    definition.guided_feature_loss_forward,
    lambda q, f_cond, f_null, weight, cfg_scale, loss, index: (statistic(q, ()), new(q)),
    TRITON,
)
define(
    "cfg_extrapolate",
    "(Tensor f_cond, Tensor f_null, float cfg_scale) -> Tensor",
    definition.cfg_extrapolate_forward,
    lambda f_cond, f_null, cfg_scale: new(f_cond),
    TRITON,
)


def _save_loss(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, dq = output
    ctx.mark_non_differentiable(dq)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dq)
    ctx.inputs = len(inputs)


def _is_one(factor: Tensor) -> bool:
    """Whether it is known to be 1 without waiting: only a real tensor of the host can be looked at, no traced one."""
    if torch.compiler.is_compiling() or type(factor) is not Tensor or factor.device.type != "cpu":
        return False
    try:
        return float(factor.detach().numpy()) == 1.0
    except RuntimeError:  # PyTorch works without NumPy, too
        return False


def _loss(name: str) -> Callable[..., tuple[Grad, ...]]:
    """dq was made in the forward pass; a 0-dim factor leaves its dtype and costs one pass, or none when fused.

    On the CPU a factor of one, as every training step has it, is seen for nothing and costs none either.
    """

    def backward(ctx: Context, dloss: Grad, _dq: None) -> tuple[Grad, ...]:
        if torch.is_grad_enabled():  # create_graph: to it dq would be a constant
            raise no_second_derivative(name)
        (dq,) = ctx.saved_tensors
        if dloss is not None:
            dq = dq if _is_one(dloss) else dq * dloss
        return (None if dloss is None else dq, *[None] * (ctx.inputs - 1))

    return backward


def _save_cfg_extrapolate(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    f_cond, f_null, ctx.cfg_scale = inputs
    ctx.dtypes = f_cond.dtype, f_null.dtype
    ctx.set_materialize_grads(False)


def _cfg_extrapolate(ctx: Context, df: Grad) -> tuple[Grad, ...]:
    if df is None:
        return None, None, None
    cond, null = ctx.dtypes
    return (df * ctx.cfg_scale).to(cond), (df * (1 - ctx.cfg_scale)).to(null), None


differentiate("align", _save_loss, _loss("align"))
differentiate("guided_feature_loss", _save_loss, _loss("guided_feature_loss"))
differentiate("cfg_extrapolate", _save_cfg_extrapolate, _cfg_extrapolate)


def _try_align(draw: Draw, size: Size) -> Inputs:
    q = draw.leaf(*size.rows)
    return Inputs((q, draw(*size.rows), draw.weight(size)), (q,), (draw.one(),))


def _try_guided_feature_loss(draw: Draw, size: Size) -> Inputs:
    q = draw.leaf(*size.rows)
    args = (q, draw(*size.rows), draw(*size.rows), draw.weight(size), CFG_SCALE, "mse", None)
    return Inputs(args, (q,), (draw.one(),))


def _try_cfg_extrapolate(draw: Draw, size: Size) -> Inputs:
    leaves = (draw.leaf(*size.rows), draw.leaf(*size.rows))
    return Inputs((*leaves, CFG_SCALE), leaves, (draw(*size.rows),))


DECLARED = {
    "align": Op(
        align, definition.align, _try_align,
        floor=(3, 0), moved=(3, 2),  # read q, f, write dq; the backward only scales dq
        free_backward_on_cpu=True,
    ),
    "guided_feature_loss": Op(
        guided_feature_loss, definition.guided_feature_loss, _try_guided_feature_loss,
        floor=(4, 0), moved=(4, 2),  # read q, f_y, f_∅, write dq
        free_backward_on_cpu=True,
    ),
    "cfg_extrapolate": Op(
        cfg_extrapolate, definition.cfg_extrapolate, _try_cfg_extrapolate,
        floor=(3, 3),  # read f_y, f_∅, write f; read df, write two
    ),
}  # fmt: skip
