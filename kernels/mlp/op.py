"""linear, gelu_tanh, swiglu: public functions with their checks, registration, gradients, FLOPs, inputs to try them.

gelu_mlp, declared here with them, is in `whole.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._ops import ops
from ..common import checks
from ..common.plain import autocast
from ..common.registry import (
    LIBRARY,
    Context,
    Grad,
    Op,
    define,
    differentiate,
    fake_bias_gradient,
    new,
    wants_gradient,
)
from ..common.trial import Draw, Inputs, Size, with_bias
from . import definition, onednn
from .whole import gelu_mlp, parts, trial

TRITON = __package__ + ".triton"


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·Wᵀ + bias (…, M) in x's dtype; gradients to all. Small layers, and all on CUDA or under autocast, are
    PyTorch's own."""
    cast = autocast(x)
    _check(x, weight, bias, one_dtype=not cast)
    if cast or not onednn.pays(x, weight):
        return definition.linear(x, weight, bias)
    y: Tensor = ops.linear(x, weight, bias)
    return y


def gelu_tanh(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """GELU's tanh form in x's dtype, any shape; gradient to x.

    x_bias (D,), the bias of the layer that made x (…, D), gets its gradient here if that layer is called with
    `x_bias.detach()`: the backward pass sums dx as it makes it.
    """
    checks.floating("gelu_tanh", x=x)
    checks.bias("gelu_tanh", "x_bias", x_bias, "x", x)
    if x.dtype == torch.float64:
        return definition.gelu_tanh(x, x_bias)
    y: Tensor = ops.gelu_tanh(x, wants_gradient(x_bias))
    return y


def swiglu(h: Tensor, h_bias: Tensor | None = None) -> Tensor:
    """silu(gate)·value (…, F) in h's dtype; h (…, 2F) is the gate and then the value, as a linear layer of 2F channels
    makes both. Gradient to h, for which h alone is kept.

    h_bias (2F,), the bias of that layer, gets its gradient here if the layer is called with `h_bias.detach()`: the
    backward pass sums dh as it makes it. Raises ValueError for an odd or missing last axis.
    """
    checks.floating("swiglu", h=h)
    if h.dim() == 0 or h.shape[-1] == 0 or h.shape[-1] % 2:
        raise ValueError(f"swiglu: h has shape {tuple(h.shape)}; (…, 2F) with F ≥ 1 is needed, the gate and the value")
    checks.bias("swiglu", "h_bias", h_bias, "h", h)
    if h.dtype == torch.float64:
        return definition.swiglu(h, h_bias)
    y: Tensor = ops.swiglu(h, wants_gradient(h_bias))
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor, one_dtype: bool) -> None:
    """x (…, K), weight (M, K), bias (M,), all of one dtype unless autocast makes it one."""
    checks.floating("linear", x=x, weight=weight, bias=bias)
    checks.rank("linear", "weight", weight, "(M, K)")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}; (…, {weight.shape[1]}), weight's K, is needed")
    checks.shape("linear", "bias", bias, weight.shape[:1], "weight's (M,)")
    if one_dtype:
        checks.one_dtype("linear", x=x, weight=weight, bias=bias)


define(
    "linear",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    definition.linear_forward,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
define(
    "linear_backward",
    "(Tensor dy, Tensor x, Tensor weight) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    definition.linear_backward,
    lambda dy, x, weight: (new(x), new(weight), weight.new_empty(weight.shape[:1])),
)
define(
    "gelu_tanh",
    "(Tensor x, Tensor? x_bias) -> Tensor",
    definition.gelu_tanh_forward,
    lambda x, x_bias: new(x),
    TRITON,
)
define(
    "gelu_tanh_backward",
    "(Tensor dy, Tensor x, Tensor? x_bias) -> (Tensor dx, Tensor dx_bias)",
    definition.gelu_tanh_backward,
    lambda dy, x, x_bias: (new(x), fake_bias_gradient(x, x_bias)),
    TRITON,
)
define(
    "swiglu",
    "(Tensor h, Tensor? h_bias) -> Tensor",
    definition.swiglu_forward,
    lambda h, h_bias: h.new_empty((*h.shape[:-1], h.shape[-1] // 2)),
    TRITON,
)
define(
    "swiglu_backward",
    "(Tensor dy, Tensor h, Tensor? h_bias) -> (Tensor dh, Tensor dh_bias)",
    definition.swiglu_backward,
    lambda dy, h, h_bias: (new(h), fake_bias_gradient(h, h_bias)),
    TRITON,
)
if onednn.available():
    LIBRARY.impl("linear", onednn.linear, "CPU")
    LIBRARY.impl("linear_backward", onednn.linear_backward, "CPU")


def _save_linear(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _linear(ctx: Context, dy: Grad) -> tuple[Grad, ...]:
    return (None, None, None) if dy is None else ops.linear_backward(dy, *ctx.saved_tensors)


differentiate("linear", _save_linear, _linear)


def _save_all(ctx: Context, inputs: tuple[Grad, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradient_of(name: str) -> Callable[..., tuple[Grad, Grad]]:
    """Of an op (x, bias of the layer before) → y: by its backward op, from dy and its inputs alone."""

    def gradient(ctx: Context, dy: Grad) -> tuple[Grad, Grad]:
        if dy is None:
            return None, None
        x, bias = ctx.saved_tensors
        dx, dbias = getattr(ops, f"{name}_backward")(dy, x, bias)
        return dx, None if bias is None else dbias

    return gradient


for _op in ("gelu_tanh", "swiglu"):
    differentiate(_op, _save_all, _gradient_of(_op))

Shape = tuple[int, ...]


@register_flop_formula(ops.linear)
def _flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(ops.linear_backward)
def _backward_flops(dy: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(x) * weight[0]


def _try_linear(draw: Draw, size: Size) -> Inputs:
    leaves = (draw.leaf(*size.rows), draw.leaf(4 * size.width, size.width), draw.leaf(4 * size.width))
    return Inputs(leaves, leaves, (draw(size.batch, size.tokens, 4 * size.width),))


def _try_gelu_tanh(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, 4 * size.width)
    x, bias = draw.leaf(*shape), draw.bias(shape[-1])
    return Inputs((x, bias), with_bias((x,), bias), (draw(*shape),))


def _try_swiglu(draw: Draw, size: Size) -> Inputs:
    """Hidden channels that make the MLP as large as one of GELU with four times the width: ⅔ of those."""
    hidden = size.hidden or max(8 * size.width // 3, 1)
    h, bias = draw.leaf(size.batch, size.tokens, 2 * hidden), draw.bias(2 * hidden)
    return Inputs((h, bias), with_bias((h,), bias), (draw(size.batch, size.tokens, hidden),))


DECLARED = {
    "linear": Op(
        linear, definition.linear, _try_linear,
        floor=(5, 10),  # D → 4·D: read x, write y; read dy twice and x, write dx (weights beside them)
    ),
    "gelu_tanh": Op(
        gelu_tanh, definition.gelu_tanh, _try_gelu_tanh,
        floor=(8, 12),  # on 4·D channels: read x, write y; read dy, x, write dx
    ),
    "swiglu": Op(
        swiglu, definition.swiglu, _try_swiglu,
        floor=(8, 40 / 3),  # of 8/3·D channels: read two, write one; read dy and two, write two
    ),
    "gelu_mlp": Op(
        gelu_mlp, definition.gelu_mlp, trial,
        floor=(2, 3),  # read x, write y; read dy, x, write dx (weights beside them)
        moved=(14, 24),  # forward h and gelu(h), 4·D channels, written, and gelu(h) read by fc2; four products backward
        instead=parts,
    ),
}  # fmt: skip
