"""The adaLN ops: public functions with their checks, registration, gradients, and inputs to try them with.

For shapes and equations see `definition.py`; the modulation's gradients come back in one slab, (B, k·D), or (B, G, k·D)
or (B, N, k·D) where a modulation has that many vectors a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..common import checks
from ..common.plain import Lengths
from ..common.registry import (
    Context,
    Grad,
    Kind,
    Op,
    define,
    differentiate,
    fake_bias_gradient,
    new,
    statistic,
    wants_gradient,
    zeros_if_none,
)
from ..common.trial import Draw, Inputs, Size, with_bias
from . import definition

TRITON = __package__ + ".triton"


def checked(
    op: str, x: Tensor, a: Tensor | None, lengths: Lengths, eps: float | None = None, norm: str = "layer",
    **vectors: Tensor,
) -> Lengths:  # fmt: skip
    """x and a (B, N, D); every modulation of one dtype, and (B, D), or (B, G, D) with G lengths, or (B, N, D).

    Returns the lengths as the ops take them: None where every run is one token.
    """
    checks.floating(op, x=x, **({} if a is None else {"a": a}), **vectors)
    checks.rank(op, "x", x, "(B, N, D)")
    if a is not None:
        checks.shape(op, "a", a, x.shape, "x's (B, N, D)")
    batch, tokens, width = x.shape
    wanted: tuple[int, ...] = batch, width
    letters = "x's (B, D)"
    if lengths is not None:
        checks.lengths(op, lengths, tokens)
        wanted, letters = (batch, len(lengths), width), "x's (B, D) with the number of lengths between, (B, G, D)"
    elif next(iter(vectors.values())).dim() == 3:
        wanted, letters = tuple(x.shape), "without lengths x's (B, N, D)"
    for name, vector in vectors.items():
        checks.shape(op, name, vector, wanted, letters)
    checks.one_dtype(op, **vectors)
    if eps is not None:
        checks.eps(op, eps)
    if norm not in definition.NORMS:
        raise ValueError(f"{op}: norm = {norm!r}; one of {', '.join(definition.NORMS)} is needed")
    return None if lengths is None or len(lengths) == tokens else lengths


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, lengths: Lengths = None, norm: str = "layer"
) -> Tensor:
    """norm(x)·(1 + scale) + shift (B, N, D) in x's dtype, norm "layer" or "rms"; gradients to x, shift and scale.

    A weight w of the norm can be folded into the scale: w·(1 + scale) − 1.
    """
    lengths = checked("norm_modulate", x, None, lengths, eps, norm, shift=shift, scale=scale)
    if x.dtype == torch.float64:
        return definition.norm_modulate(x, shift, scale, eps, lengths, norm)
    y: Tensor = ops.norm_modulate(x, shift, scale, eps, lengths, norm == "rms")[0]
    return y


def gate_residual(x: Tensor, a: Tensor, gate: Tensor, lengths: Lengths = None) -> Tensor:
    """x + gate·a (B, N, D) in x's dtype; gradients to all."""
    lengths = checked("gate_residual", x, a, lengths, gate=gate)
    if x.dtype == torch.float64:
        return definition.gate_residual(x, a, gate, lengths)
    x_out: Tensor = ops.gate_residual(x, a, gate, lengths)
    return x_out


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6,
    a_bias: Tensor | None = None, lengths: Lengths = None, norm: str = "layer",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·a and y = norm(x')·(1 + scale) + shift, both in x's dtype; norm "layer" or "rms"; gradients to all.

    a_bias (D,), the bias of the layer that made a, gets its gradient here if that layer is called with
    `a_bias.detach()`: the backward pass has da at hand and sums it without reading it again.
    """
    lengths = checked("gate_residual_norm_modulate", x, a, lengths, eps, norm, gate=gate, shift=shift, scale=scale)
    checks.bias("gate_residual_norm_modulate", "a_bias", a_bias, "a", a)
    if x.dtype == torch.float64:
        return definition.gate_residual_norm_modulate(x, a, gate, shift, scale, eps, a_bias, lengths, norm)
    a_bias, rms = wants_gradient(a_bias), norm == "rms"
    x_out, y, _, _ = ops.gate_residual_norm_modulate(x, a, gate, shift, scale, eps, a_bias, lengths, rms)
    return x_out, y


def _slab(scale: Tensor, parts: int) -> Tensor:
    """A fake of the gradients of `parts` modulations like `scale`, side by side."""
    return scale.new_empty((*scale.shape[:-1], parts * scale.shape[-1]))


def _statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Fakes of the mean, which RMSNorm does not have, and rstd."""
    return statistic(x, (0,) if rms else x.shape[:2]), statistic(x, x.shape[:2])


define(
    "norm_modulate",
    "(Tensor x, Tensor shift, Tensor scale, float eps, int[]? lengths=None, bool rms=False)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    definition.norm_modulate_forward,
    lambda x, shift, scale, eps, lengths=None, rms=False: (new(x), *_statistics(x, rms)),
    TRITON,
)
define(
    "norm_modulate_backward",
    "(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, int[]? lengths=None, bool rms=False)"
    " -> (Tensor dx, Tensor dmod)",
    definition.norm_modulate_backward,
    lambda dy, x, scale, mean, rstd, lengths=None, rms=False: (new(x), _slab(scale, 2)),
    TRITON,
)
define(
    "gate_residual_norm_modulate",
    "(Tensor x, Tensor a, Tensor gate, Tensor shift, Tensor scale, float eps, Tensor? a_bias, int[]? lengths=None, "
    "bool rms=False) -> (Tensor x_out, Tensor y, Tensor mean, Tensor rstd)",
    definition.gate_residual_norm_modulate_forward,
    lambda x, a, gate, shift, scale, eps, a_bias, lengths=None, rms=False: (new(x), new(x), *_statistics(x, rms)),
    TRITON,
)
define(
    "gate_residual_norm_modulate_backward",
    "(Tensor dx_out, Tensor dy, Tensor x_out, Tensor a, Tensor gate, Tensor scale, Tensor mean, Tensor rstd, "
    "Tensor? a_bias, int[]? lengths=None, bool rms=False) -> (Tensor dx, Tensor da, Tensor dmod, Tensor da_bias)",
    definition.gate_residual_norm_modulate_backward,
    lambda dx_out, dy, x_out, a, gate, scale, mean, rstd, a_bias, lengths=None, rms=False: (
        new(x_out), new(a), _slab(scale, 3), fake_bias_gradient(x_out, a_bias)
    ),
    TRITON,
)  # fmt: skip
define(
    "gate_residual",
    "(Tensor x, Tensor a, Tensor gate, int[]? lengths=None) -> Tensor",
    definition.gate_residual_forward,
    lambda x, a, gate, lengths=None: new(x),
    TRITON,
)
define(
    "gate_residual_backward",
    "(Tensor dx_out, Tensor a, Tensor gate, int[]? lengths=None) -> (Tensor da, Tensor dgate)",
    definition.gate_residual_backward,
    lambda dx_out, a, gate, lengths=None: (new(a), new(gate)),
    TRITON,
)


def _save_norm_modulate(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, _, *ctx.rest = inputs  # lengths and rms; the dispatcher leaves out defaults at the end
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _norm_modulate(ctx: Context, dy: Grad, _mean: None, _rstd: None) -> tuple[Grad, ...]:
    if dy is None:
        return None, None, None, None, None, None
    dx, dmod = ops.norm_modulate_backward(dy, *ctx.saved_tensors, *ctx.rest)
    dshift, dscale = dmod.chunk(2, -1)
    return dx, dshift, dscale, None, None, None


def _save_gate_residual_norm_modulate(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, a, gate, _, scale, _, a_bias, *ctx.rest = inputs
    x_out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_out, a, gate, scale, mean, rstd, a_bias)


def _gate_residual_norm_modulate(ctx: Context, dx_out: Grad, dy: Grad, _mean: None, _rstd: None) -> tuple[Grad, ...]:
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second look is refused
    x_out = saved[0]
    dx, da, dmod, da_bias = ops.gate_residual_norm_modulate_backward(
        zeros_if_none(dx_out, x_out), zeros_if_none(dy, x_out), *saved, *ctx.rest
    )
    dgate, dshift, dscale = dmod.chunk(3, -1)
    return dx, da, dgate, dshift, dscale, None, None if saved[-1] is None else da_bias, None, None


def _save_gate_residual(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, a, gate, *ctx.lengths = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, gate)


def _gate_residual(ctx: Context, dx_out: Grad) -> tuple[Grad, ...]:
    if dx_out is None:
        return None, None, None, None
    da, dgate = ops.gate_residual_backward(dx_out, *ctx.saved_tensors, *ctx.lengths)
    return dx_out, da, dgate, None


differentiate("norm_modulate", _save_norm_modulate, _norm_modulate)
differentiate("gate_residual_norm_modulate", _save_gate_residual_norm_modulate, _gate_residual_norm_modulate)
differentiate("gate_residual", _save_gate_residual, _gate_residual)


def _try_norm_modulate(draw: Draw, size: Size, *vectors: int, rest: tuple[Any, ...] = ()) -> Inputs:
    x, (shift, scale, *_) = draw.leaf(*size.rows), draw.modulation(size, *vectors)
    return Inputs((x, shift, scale, 1e-6, *rest), (x, shift, scale), (draw(*size.rows),))


def _try_gate_residual_norm_modulate(draw: Draw, size: Size, *vectors: int, rest: tuple[Any, ...] = ()) -> Inputs:
    leaves = (draw.leaf(*size.rows), draw.leaf(*size.rows), *draw.modulation(size, *vectors)[2:5])
    bias = draw.bias(size.width)
    grads = draw(*size.rows), draw(*size.rows)
    return Inputs((*leaves, 1e-6, bias, *rest), with_bias(leaves, bias), grads)


def _try_gate_residual(draw: Draw, size: Size, *vectors: int, rest: tuple[Any, ...] = ()) -> Inputs:
    leaves = (draw.leaf(*size.rows), draw.leaf(*size.rows), draw.modulation(size, *vectors)[2])
    return Inputs((*leaves, *rest), leaves, (draw(*size.rows),))


def _groups(size: Size) -> tuple[int, ...]:
    """A quarter of the tokens, and the others."""
    quarter = size.tokens // 4
    return (quarter, size.tokens - quarter) if quarter else (size.tokens,)


def _kinds(make: Callable[..., Inputs]) -> dict[str, Kind]:
    """A modulation of two groups of tokens, and one of every token."""

    def groups(draw: Draw, size: Size) -> Inputs:
        return make(draw, size, len(_groups(size)), rest=(_groups(size),))

    return {
        "groups": Kind(groups, lambda size: len(_groups(size))),
        "tokens": Kind(lambda draw, size: make(draw, size, size.tokens), lambda size: size.tokens),
    }


def _rms(make: Callable[..., Inputs]) -> dict[str, Kind]:
    """RMSNorm, which has no mean to keep."""
    return {"rms": Kind(lambda draw, size: make(draw, size, rest=(None, "rms")), statistics=lambda size: 1)}


DECLARED = {
    "norm_modulate": Op(
        norm_modulate, definition.norm_modulate, _try_norm_modulate,
        floor=(2, 3),  # read x, write y; read dy, x, write dx
        vectors=(2, 3), statistics=lambda size: 2, kinds=_kinds(_try_norm_modulate) | _rms(_try_norm_modulate),
    ),
    "gate_residual_norm_modulate": Op(
        gate_residual_norm_modulate, definition.gate_residual_norm_modulate, _try_gate_residual_norm_modulate,
        floor=(4, 6),  # read x, a, write x', y; read dy, dx', x', a, write dx, da
        vectors=(3, 5), statistics=lambda size: 2,
        kinds=_kinds(_try_gate_residual_norm_modulate) | _rms(_try_gate_residual_norm_modulate),
    ),
    "gate_residual": Op(
        gate_residual, definition.gate_residual, _try_gate_residual,
        floor=(3, 3),  # read x, a, write x'; read dx', a, write da
        vectors=(1, 2), kinds=_kinds(_try_gate_residual),
    ),
}  # fmt: skip
