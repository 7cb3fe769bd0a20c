"""Gradients of the ops. Statistics and gradients made in the forward pass are outputs without a gradient of their own.

Gradients that never arrive are None, not zeros that someone has to write and read. Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import LIBRARY

OPS = torch.ops.st_fast

Context = Any  # autograd's context object: attributes are set and read freely
Grad = Tensor | None


def _no_second_derivative(name: str) -> NotImplementedError:
    return NotImplementedError(f"st_fast.{name}: there is no second derivative; use the reference ops for it")


def _zeros_if_none(grad: Grad, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _save_norm_modulate(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _norm_modulate(ctx: Context, dy: Grad, _mean: None, _rstd: None) -> tuple[Grad, ...]:
    if dy is None:
        return None, None, None, None
    dx, dmod = OPS.norm_modulate_backward(dy, *ctx.saved_tensors)
    dshift, dscale = dmod.chunk(2, 1)
    return dx, dshift, dscale, None


def _save_gate_residual_norm_modulate(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, a, gate, _, scale, _ = inputs
    x_out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_out, a, gate, scale, mean, rstd)


def _gate_residual_norm_modulate(ctx: Context, dx_out: Grad, dy: Grad, _mean: None, _rstd: None) -> tuple[Grad, ...]:
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second look is refused
    x_out = saved[0]
    dx, da, dmod = OPS.gate_residual_norm_modulate_backward(
        _zeros_if_none(dx_out, x_out), _zeros_if_none(dy, x_out), *saved
    )
    dgate, dshift, dscale = dmod.chunk(3, 1)
    return dx, da, dgate, dshift, dscale, None


def _save_gate_residual(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, a, gate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, gate)


def _gate_residual(ctx: Context, dx_out: Grad) -> tuple[Grad, ...]:
    if dx_out is None:
        return None, None, None
    return dx_out, *OPS.gate_residual_backward(dx_out, *ctx.saved_tensors)


def _save_loss(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, dq = output
    ctx.mark_non_differentiable(dq)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dq)
    ctx.inputs = len(inputs)


def _is_one(factor: Tensor) -> bool:
    """Whether it is known to be 1 without waiting: only a real tensor of the host can be looked at, no traced one."""
    return type(factor) is Tensor and factor.device.type == "cpu" and float(factor.detach().numpy()) == 1.0


def _loss(name: str) -> Callable[..., tuple[Grad, ...]]:
    """dq was made in the forward pass; a 0-dim factor leaves its dtype and costs one pass, or none when fused.

    On the CPU a factor of one, as every training step has it, is seen for nothing and costs none either.
    """

    def backward(ctx: Context, dloss: Grad, _dq: None) -> tuple[Grad, ...]:
        if torch.is_grad_enabled():  # create_graph: to it dq would be a constant
            raise _no_second_derivative(name)
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


def _save_qk_norm(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, q_weight, _, k_weight, _, _ = inputs
    stats = output[3]
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, q_weight, k_weight, stats)


def _qk_norm(ctx: Context, dq: Grad, dk: Grad, dv: Grad, _stats: None) -> tuple[Grad, ...]:
    saved = ctx.saved_tensors
    like = saved[0][:, :, 0].transpose(1, 2)  # (B, H, N, d)
    grads = [_zeros_if_none(grad, like) for grad in (dq, dk, dv)]
    return *OPS.qk_norm_backward(*grads, *saved), None


def _save_attention(ctx: Context, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _attention(ctx: Context, dout: Grad, _lse: None) -> Grad:
    return None if dout is None else OPS.attention_backward(dout, *ctx.saved_tensors)


def _save_linear(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _linear(ctx: Context, dy: Grad) -> tuple[Grad, ...]:
    return (None, None, None) if dy is None else OPS.linear_backward(dy, *ctx.saved_tensors)


def _save_gelu_tanh(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gelu_tanh(ctx: Context, dy: Grad) -> Grad:
    return None if dy is None else OPS.gelu_tanh_backward(dy, *ctx.saved_tensors)


def _register(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    torch.library.register_autograd(f"st_fast::{name}", backward, setup_context=save, lib=LIBRARY)


def _refuse(name: str) -> Callable[..., None]:
    def backward(ctx: Context, *grads: Grad) -> None:
        raise _no_second_derivative(name)

    return backward


_register("norm_modulate", _norm_modulate, _save_norm_modulate)
_register("gate_residual_norm_modulate", _gate_residual_norm_modulate, _save_gate_residual_norm_modulate)
_register("gate_residual", _gate_residual, _save_gate_residual)
_register("align", _loss("align"), _save_loss)
_register("guided_feature_loss", _loss("guided_feature_loss"), _save_loss)
_register("cfg_extrapolate", _cfg_extrapolate, _save_cfg_extrapolate)
_register("qk_norm", _qk_norm, _save_qk_norm)
_register("attention", _attention, _save_attention)
_register("linear", _linear, _save_linear)
_register("gelu_tanh", _gelu_tanh, _save_gelu_tanh)
for _name in (
    "norm_modulate",
    "gate_residual_norm_modulate",
    "gate_residual",
    "qk_norm",
    "attention",
    "linear",
    "gelu_tanh",
):
    _register(f"{_name}_backward", _refuse(_name), lambda ctx, inputs, output: None)
