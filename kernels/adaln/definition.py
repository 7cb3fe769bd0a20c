"""adaLN in plain PyTorch: the definitions, and below them forward and backward in closed form, as the ops register.

x and a are (B, N, D); gate, shift and scale (B, D), any strides. All is computed in float32 (float64 for float64) and
returned in the dtype of the first argument. Forwards and backwards return contiguous tensors of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import bias_gradient, norm_backward, up, with_bias_gradient


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift, the adaLN of DiT (arXiv 2212.09748); LN has no affine.

    x (B, N, D); shift, scale (B, D), any strides. Returns (B, N, D) in x's dtype.
    """
    h = up(x)
    h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps)
    return (h * (1 + up(scale).unsqueeze(1)) + up(shift).unsqueeze(1)).to(x.dtype)


def gate_residual(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """x + gate·a. x, a (B, N, D); gate (B, D). Returns (B, N, D) in x's dtype."""
    return (up(x) + up(gate).unsqueeze(1) * up(a)).to(x.dtype)


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6,
    a_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·a and y = LN(x')·(1 + scale) + shift; returns (x', y).

    x, a (B, N, D); gate, shift, scale (B, D). The statistics are those of x' as it is stored, in x's dtype. a_bias (D,)
    is read for its gradient only: that of the bias of the layer that made a, if it was called with a_bias.detach().
    """
    x_out = gate_residual(x, with_bias_gradient(a, a_bias), gate)
    return x_out, norm_modulate(x_out, shift, scale, eps)


def norm_modulate_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """→ y (B, N, D) in x's dtype; mean and rstd (B, N) in the computing dtype."""
    h, mean, rstd = torch.native_layer_norm(up(x), x.shape[-1:], None, None, eps)
    y = h * (1 + up(scale).unsqueeze(1)) + up(shift).unsqueeze(1)
    return y.to(x.dtype).contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def norm_modulate_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """→ dx in x's dtype and the slab (B, 2D) = [dshift, dscale] in scale's."""
    h = (up(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx = norm_backward(up(dy) * (1 + up(scale).unsqueeze(1)), h, rstd)
    slab = torch.cat([up(dy).sum(1), (up(dy) * h).sum(1)], 1)
    return dx.to(x.dtype).contiguous(), slab.to(scale.dtype)


def gate_residual_forward(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """→ x + gate·a in x's dtype."""
    return gate_residual(x, a, gate).contiguous()


def gate_residual_backward(dx_out: Tensor, a: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """→ da in a's dtype, dgate (B, D) in gate's."""
    da = up(dx_out) * up(gate).unsqueeze(1)
    return da.to(a.dtype).contiguous(), (up(dx_out) * up(a)).sum(1).to(gate.dtype)


def gate_residual_norm_modulate_forward(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, a_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ x' = x + gate·a, y, and the mean and rstd of x'."""
    x_out = gate_residual_forward(x, a, gate)
    y, mean, rstd = norm_modulate_forward(x_out, shift, scale, eps)
    return x_out, y, mean, rstd


def gate_residual_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, a: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    a_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """→ dx, da, the slab (B, 3D) = [dgate, dshift, dscale] in scale's dtype, and da_bias (D,) or (0,)."""
    h = (up(x_out) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx = up(dx_out) + norm_backward(up(dy) * (1 + up(scale).unsqueeze(1)), h, rstd)
    slab = torch.cat([(dx * up(a)).sum(1), up(dy).sum(1), (up(dy) * h).sum(1)], 1)
    da = dx * up(gate).unsqueeze(1)
    da_bias = bias_gradient(da, a_bias)
    return dx.to(x_out.dtype).contiguous(), da.to(a.dtype).contiguous(), slab.to(scale.dtype), da_bias
