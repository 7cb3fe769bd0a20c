"""Linear layers, GELU and SwiGLU in plain PyTorch: the definitions, and below them the forms that the ops register."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import bias_gradient, up, with_bias_gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·Wᵀ + bias over the last axis: x (…, K), weight (M, K), bias (M,), all of one dtype. Returns (…, M)."""
    return torch.nn.functional.linear(x, weight, bias)


def gelu_tanh(x: Tensor, x_bias: Tensor | None = None) -> Tensor:
    """½x·(1 + tanh(√(2/π)·(x + 0.044715x³))), GELU's tanh form (arXiv 1606.08415), any shape; in x's dtype.

    x_bias, one number for each channel of x's last axis, is read for its gradient only: that of the bias of the layer
    that made x, if it was called with x_bias.detach().
    """
    return torch.nn.functional.gelu(up(with_bias_gradient(x, x_bias)), approximate="tanh").to(x.dtype)


def swiglu(h: Tensor, h_bias: Tensor | None = None) -> Tensor:
    """silu(gate)·value (…, F) of h (…, 2F), whose first half is the gate (arXiv 2002.05202, without the linear layers);
    silu(g) = g·σ(g). In h's dtype.

    h_bias (2F,) is read for its gradient only: that of the bias of the layer that made h, if it was called with
    h_bias.detach().
    """
    gate, value = up(with_bias_gradient(h, h_bias)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * value).to(h.dtype)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """→ x·Wᵀ + bias (…, M), contiguous."""
    return linear(x, weight, bias).contiguous()


def weight_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """→ dweight (M, K) and dbias (M,) of a linear layer."""
    rows = dy.reshape(-1, dy.shape[-1])  # (R, M)
    return rows.t() @ x.reshape(-1, x.shape[-1]), dy.sum(tuple(range(dy.dim() - 1)))


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ dx (…, K), dweight (M, K), dbias (M,), each in the layer's dtype."""
    return (dy @ weight).contiguous(), *weight_gradients(dy, x, weight)


def gelu_tanh_forward(x: Tensor, x_bias: Tensor | None) -> Tensor:
    """→ GELU's tanh form in x's dtype."""
    return torch.nn.functional.gelu(up(x), approximate="tanh").to(x.dtype).contiguous()


def gelu_tanh_backward(dy: Tensor, x: Tensor, x_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """→ dx in x's dtype, and dx_bias, which is empty without x_bias."""
    dx = torch.ops.aten.gelu_backward(up(dy), up(x), approximate="tanh")
    return dx.to(x.dtype).contiguous(), bias_gradient(dx, x_bias)


def swiglu_forward(h: Tensor, h_bias: Tensor | None) -> Tensor:
    """→ silu(gate)·value (…, F) in h's dtype."""
    return swiglu(h).contiguous()


def swiglu_backward(dy: Tensor, h: Tensor, h_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """→ dh (…, 2F) in h's dtype, and dh_bias, which is empty without h_bias."""
    (gate, value), dy = up(h).chunk(2, dim=-1), up(dy)
    sigma = gate.sigmoid()
    dgate = dy * value * (sigma + gate * sigma * (1 - sigma))
    dh = torch.cat((dgate, dy * gate * sigma), dim=-1)
    return dh.to(h.dtype).contiguous(), bias_gradient(dh, h_bias)


def gelu_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Two linear layers with GELU's tanh form between: x (…, D), fc1 (M, D) and (M,), fc2 (D', M) and (D',), all of one
    dtype. Returns (…, D')."""
    return linear(gelu_tanh(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def gelu_mlp_forward(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """→ y (…, D'), gelu(h) and h (…, M), contiguous."""
    h = linear_forward(x, fc1_weight, fc1_bias)
    g = gelu_tanh_forward(h, None)
    return linear_forward(g, fc2_weight, fc2_bias), g, h


def gelu_mlp_backward(dy: Tensor, fc2_weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """→ dh (…, M) and fc1's dbias (M,)."""
    dh, _ = gelu_tanh_backward(dy @ fc2_weight, h, None)
    return dh, dh.sum(tuple(range(dh.dim() - 1)))
