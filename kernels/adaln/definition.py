"""adaLN in plain PyTorch: the definitions, and below them forward and backward in closed form, as the ops register.

x and a are (B, N, D). gate, shift and scale, any strides, are one vector a sample, (B, D); or (B, G, D) with the
`lengths` of G runs of consecutive tokens, the same in all samples, each of which has a vector; or (B, N, D) without
`lengths`, one a token. The norm over the D channels is LayerNorm ("layer") or RMSNorm ("rms", arXiv 1910.07467), either
without affine. All is computed in float32 (float64 for float64) and returned in the dtype of the first argument.
Forwards and backwards return contiguous tensors of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.plain import Lengths, bias_gradient, norm_backward, up, with_bias_gradient

NORMS = ("layer", "rms")


def over_tokens(vector: Tensor, lengths: Lengths) -> Tensor:
    """A modulation in the computing dtype, as it is multiplied with (B, N, D): (B, 1 or N, D)."""
    vector = up(vector)
    if vector.dim() == 2:
        return vector.unsqueeze(1)
    if lengths is None:
        return vector
    return torch.cat([vector[:, run : run + 1].expand(-1, n, -1) for run, n in enumerate(lengths)], 1)


def over_runs(grad: Tensor, like: Tensor, lengths: Lengths) -> Tensor:
    """The gradient of a modulation `like`, in the computing dtype, from what each token adds, (B, N, D)."""
    if like.dim() == 2:
        return grad.sum(1)
    return grad if lengths is None else torch.stack([run.sum(1) for run in grad.split(list(lengths), 1)], 1)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, lengths: Lengths = None, norm: str = "layer"
) -> Tensor:
    """norm(x)·(1 + scale) + shift, the adaLN of DiT (arXiv 2212.09748); the norm has no affine.

    x (B, N, D); shift, scale (B, D), or (B, G, D) with lengths, or (B, N, D). norm: "layer", (x − mean)·rstd, or "rms",
    x·rsqrt(mean(x²) + eps). Returns (B, N, D) in x's dtype.
    """
    h = up(x)
    if norm == "rms":  # PyTorch's own rms_norm takes several times as long on a CPU, backward above all
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    else:
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps)
    return (h * (1 + over_tokens(scale, lengths)) + over_tokens(shift, lengths)).to(x.dtype)


def gate_residual(x: Tensor, a: Tensor, gate: Tensor, lengths: Lengths = None) -> Tensor:
    """x + gate·a. x, a (B, N, D); gate (B, D), or (B, G, D) with lengths, or (B, N, D). Returns (B, N, D) in x's
    dtype."""
    return (up(x) + over_tokens(gate, lengths) * up(a)).to(x.dtype)


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6,
    a_bias: Tensor | None = None, lengths: Lengths = None, norm: str = "layer",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x' = x + gate·a and y = norm(x')·(1 + scale) + shift; returns (x', y).

    x, a (B, N, D); gate, shift, scale (B, D), or (B, G, D) with lengths, or (B, N, D); norm as in norm_modulate. The
    statistics are those of x' as it is stored, in x's dtype. a_bias (D,) is read for its gradient only: that of the
    bias of the layer that made a, if it was called with a_bias.detach().
    """
    x_out = gate_residual(x, with_bias_gradient(a, a_bias), gate, lengths)
    return x_out, norm_modulate(x_out, shift, scale, eps, lengths, norm)


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """x (B, N, D) by its statistics (B, N), in the computing dtype; RMSNorm has no mean."""
    return (up(x) if rms else up(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def norm_modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, lengths: Lengths = None, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """→ y (B, N, D) in x's dtype; mean, of RMSNorm (0,), and rstd (B, N) in the computing dtype."""
    if rms:
        mean, rstd = up(x).new_empty(0), (up(x).square().mean(-1) + eps).rsqrt()
        h = normalised(x, mean, rstd, rms)
    else:
        h, mean, rstd = torch.native_layer_norm(up(x), x.shape[-1:], None, None, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    y = h * (1 + over_tokens(scale, lengths)) + over_tokens(shift, lengths)
    return y.to(x.dtype).contiguous(), mean, rstd


def norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, lengths: Lengths = None, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """→ dx in x's dtype and the slab (B, [G or N,] 2D) = [dshift, dscale] in scale's."""
    h = normalised(x, mean, rstd, rms)
    dx = norm_backward(up(dy) * (1 + over_tokens(scale, lengths)), h, rstd, rms)
    slab = torch.cat([over_runs(grad, scale, lengths) for grad in (up(dy), up(dy) * h)], -1)
    return dx.to(x.dtype).contiguous(), slab.to(scale.dtype)


def gate_residual_forward(x: Tensor, a: Tensor, gate: Tensor, lengths: Lengths = None) -> Tensor:
    """→ x + gate·a in x's dtype."""
    return gate_residual(x, a, gate, lengths).contiguous()


def gate_residual_backward(dx_out: Tensor, a: Tensor, gate: Tensor, lengths: Lengths = None) -> tuple[Tensor, Tensor]:
    """→ da in a's dtype, dgate in gate's dtype and shape."""
    da = up(dx_out) * over_tokens(gate, lengths)
    dgate = over_runs(up(dx_out) * up(a), gate, lengths)
    return da.to(a.dtype).contiguous(), dgate.to(gate.dtype).contiguous()


def gate_residual_norm_modulate_forward(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, a_bias: Tensor | None,
    lengths: Lengths = None, rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """→ x' = x + gate·a, y, and the mean, of RMSNorm (0,), and rstd of x'."""
    x_out = gate_residual_forward(x, a, gate, lengths)
    y, mean, rstd = norm_modulate_forward(x_out, shift, scale, eps, lengths, rms)
    return x_out, y, mean, rstd


def gate_residual_norm_modulate_backward(
    dx_out: Tensor, dy: Tensor, x_out: Tensor, a: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    a_bias: Tensor | None, lengths: Lengths = None, rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """→ dx, da, the slab (B, [G or N,] 3D) = [dgate, dshift, dscale] in scale's dtype, and da_bias (D,) or (0,)."""
    h = normalised(x_out, mean, rstd, rms)
    dx = up(dx_out) + norm_backward(up(dy) * (1 + over_tokens(scale, lengths)), h, rstd, rms)
    slab = torch.cat([over_runs(grad, scale, lengths) for grad in (dx * up(a), up(dy), up(dy) * h)], -1)
    da = dx * over_tokens(gate, lengths)
    da_bias = bias_gradient(da, a_bias)
    return dx.to(x_out.dtype).contiguous(), da.to(a.dtype).contiguous(), slab.to(scale.dtype), da_bias
