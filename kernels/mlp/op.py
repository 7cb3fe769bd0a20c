"""linear and gelu_tanh: public functions with their checks, registration, gradients, FLOPs, and inputs to try them.

gelu_mlp, declared here with them, is in `whole.py`.
"""

from __future__ import annotations

import math
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


def _save_gelu_tanh(ctx: Context, inputs: tuple[Grad, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gelu_tanh(ctx: Context, dy: Grad) -> tuple[Grad, Grad]:
    if dy is None:
        return None, None
    x, x_bias = ctx.saved_tensors
    dx, dx_bias = ops.gelu_tanh_backward(dy, x, x_bias)
    return dx, None if x_bias is None else dx_bias


differentiate("gelu_tanh", _save_gelu_tanh, _gelu_tanh)

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


DECLARED = {
    "linear": Op(
        linear, definition.linear, _try_linear,
        floor=(5, 10),  # D → 4·D: read x, write y; read dy twice and x, write dx (weights beside them)
    ),
    "gelu_tanh": Op(
        gelu_tanh, definition.gelu_tanh, _try_gelu_tanh,
        floor=(8, 12),  # on 4·D channels: read x, write y; read dy, x, write dx
    ),
    "gelu_mlp": Op(
        gelu_mlp, definition.gelu_mlp, trial,
        floor=(2, 3),  # read x, write y; read dy, x, write dx (weights beside them)
        moved=(14, 24),  # forward h and gelu(h), 4·D channels, written, and gelu(h) read by fc2; four products backward
        instead=parts,
    ),
}  # fmt: skip
