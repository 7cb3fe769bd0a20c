"""gelu_mlp: the whole MLP as one op, with GELU in its products on CUDA: checks, registration, gradient, inputs."""

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
from ..common.registry import LIBRARY, Context, Grad, define, differentiate, new, no_second_derivative
from ..common.trial import Draw, Inputs, Size
from . import cublaslt, definition


def gelu_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """fc2(gelu(fc1(x))) (…, D') in x's dtype, GELU in its tanh form; gradients to all.

    For its gradient it keeps gelu(h) and h (…, M) beside x; on CUDA, where none is wanted, nothing. Under autocast it
    is PyTorch's own layers.
    """
    arguments = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    cast = autocast(x)
    _check(*arguments, one_dtype=not cast)
    if x.dtype == torch.float64 or cast:
        return definition.gelu_mlp(*arguments)
    wanted = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
    if x.device.type in cublaslt.DEVICES and not wanted:
        return cublaslt.frozen(*arguments)
    y: Tensor = ops.gelu_mlp(*arguments)[0]
    return y


def _check(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, one_dtype: bool
) -> None:
    """x (…, D), fc1 (M, D) and (M,), fc2 (D', M) and (D',), all of one dtype unless autocast makes it one."""
    op, others = "gelu_mlp", {
        "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias
    }  # fmt: skip
    checks.floating(op, x=x, **others)
    checks.rank(op, "fc1_weight", fc1_weight, "(M, D)")
    checks.rank(op, "fc2_weight", fc2_weight, "(D', M)")
    if x.dim() == 0 or x.shape[-1] != fc1_weight.shape[1]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; (…, {fc1_weight.shape[1]}), fc1_weight's D, is needed")
    checks.shape(op, "fc1_bias", fc1_bias, fc1_weight.shape[:1], "fc1_weight's (M,)")
    checks.shape(op, "fc2_weight", fc2_weight, (fc2_weight.shape[0], fc1_weight.shape[0]), "(D', fc1_weight's M)")
    checks.shape(op, "fc2_bias", fc2_bias, fc2_weight.shape[:1], "fc2_weight's (D',)")
    if one_dtype:
        checks.one_dtype(op, x=x, **others)


def _fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inner = (*x.shape[:-1], w1.shape[0])
    return x.new_empty((*x.shape[:-1], w2.shape[0])), x.new_empty(inner), x.new_empty(inner)


define(
    "gelu_mlp",
    "(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias)"
    " -> (Tensor y, Tensor g, Tensor h)",
    definition.gelu_mlp_forward,
    _fake,
)
define(
    "gelu_mlp_backward",
    "(Tensor dy, Tensor fc2_weight, Tensor h) -> (Tensor dh, Tensor dfc1_bias)",
    definition.gelu_mlp_backward,
    lambda dy, fc2_weight, h: (new(h), h.new_empty(h.shape[-1:])),
)
if cublaslt.lacking() is None:
    LIBRARY.impl("gelu_mlp", cublaslt.forward, "CUDA")
    LIBRARY.impl("gelu_mlp_backward", cublaslt.backward, "CUDA")


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, fc1_weight, _, fc2_weight, _ = inputs
    _, g, h = output
    ctx.mark_non_differentiable(g, h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, fc1_weight, fc2_weight, g, h)


def _gradient(ctx: Context, dy: Grad, _g: None, _h: None) -> tuple[Grad, ...]:
    """The products that no GELU belongs to are PyTorch's, so that a compiler sees them; what nobody wants is None."""
    if dy is None:
        return None, None, None, None, None
    if torch.is_grad_enabled():  # g and h would be taken for constants
        raise no_second_derivative("gelu_mlp")
    x, fc1_weight, fc2_weight, g, h = ctx.saved_tensors
    to_x, to_fc1, to_bias1, to_fc2, to_bias2 = ctx.needs_input_grad[-5:]
    rows = dy.reshape(-1, dy.shape[-1])  # (R, D')
    dx = dfc1 = dbias1 = None
    if to_x or to_fc1 or to_bias1:
        dh, dbias1 = ops.gelu_mlp_backward(dy, fc2_weight, h)
        inner = dh.view(-1, dh.shape[-1])  # (R, M)
        dx = (inner @ fc1_weight).view(x.shape) if to_x else None
        dfc1 = inner.t() @ x.reshape(-1, x.shape[-1]) if to_fc1 else None
    dfc2 = rows.t() @ g.view(-1, g.shape[-1]) if to_fc2 else None
    return dx, dfc1, dbias1, dfc2, rows.sum(0) if to_bias2 else None


differentiate("gelu_mlp", _save, _gradient)

Shape = tuple[int, ...]


@register_flop_formula(ops.gelu_mlp)
def _flops(x: Shape, w1: Shape, b1: Shape, w2: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2))


@register_flop_formula(ops.gelu_mlp_backward)
def _backward_flops(dy: Shape, w2: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy[:-1]) * math.prod(w2)  # the other three products are counted as PyTorch's


def parts(table: Any) -> Callable[..., Tensor]:
    """The same by a table's `linear` and `gelu_tanh`, which sums fc1's bias gradient if the table says so."""

    def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
        bias, left = (fc1_bias.detach(), fc1_bias) if table.bias_gradients else (fc1_bias, None)
        g = table.gelu_tanh(table.linear(x, fc1_weight, bias), left)
        y: Tensor = table.linear(g, fc2_weight, fc2_bias)
        return y

    return mlp


def trial(draw: Draw, size: Size) -> Inputs:
    """Inputs as a block has them."""
    wide, deep = size.hidden or 4 * size.width, size.width
    leaves = (
        draw.leaf(*size.rows), draw.weights(wide, deep), draw.leaf(wide), draw.weights(deep, wide), draw.leaf(deep)
    )  # fmt: skip
    return Inputs(leaves, leaves, (draw(*size.rows),))
