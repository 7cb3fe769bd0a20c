"""The public ops: the signatures of `reference.py`, arguments checked, run through `torch.ops.st_fast.*`.

float64 has no kernel anywhere and goes to the reference. Each function raises TypeError or ValueError with one line
that names the argument, what came and what is allowed. For shapes and equations see `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, counted, gradients, onednn, reference  # noqa: F401  counted and gradients register themselves

OPS = torch.ops.st_fast


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x)·(1 + scale) + shift (B, N, D) in x's dtype; gradients to x, shift and scale."""
    checks.modulated("norm_modulate", x, None, eps, shift=shift, scale=scale)
    if x.dtype == torch.float64:
        return reference.norm_modulate(x, shift, scale, eps)
    y: Tensor = OPS.norm_modulate(x, shift, scale, eps)[0]
    return y


def gate_residual(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """x + gate·a (B, N, D) in x's dtype; gradients to all."""
    checks.modulated("gate_residual", x, a, gate=gate)
    if x.dtype == torch.float64:
        return reference.gate_residual(x, a, gate)
    x_out: Tensor = OPS.gate_residual(x, a, gate)
    return x_out


def gate_residual_norm_modulate(
    x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·a and y = LN(x')·(1 + scale) + shift, both in x's dtype; gradients to all."""
    checks.modulated("gate_residual_norm_modulate", x, a, eps, gate=gate, shift=shift, scale=scale)
    if x.dtype == torch.float64:
        return reference.gate_residual_norm_modulate(x, a, gate, shift, scale, eps)
    x_out, y, _, _ = OPS.gate_residual_norm_modulate(x, a, gate, shift, scale, eps)
    return x_out, y


def _wide_enough(q: Tensor) -> Tensor:
    """float16 q as float32: the gradient is made in the forward pass, before any loss scale, and float16 has no room
    for its 1/(B·N·D)."""
    return q.float() if q.dtype == torch.float16 else q


def align(q: Tensor, f: Tensor, weight: Tensor) -> Tensor:
    """Σ_b w_b · mean_n −cos(q_bn, f_bn), a float32 scalar; gradient to q, made in the forward pass."""
    checks.aligned("align", q, f, weight)
    if q.dtype == torch.float64:
        return reference.align(q, f, weight)
    loss: Tensor = OPS.align(_wide_enough(q), f, weight)[0]
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
    checks.guided("guided_feature_loss", q, f_cond, f_null, weight, cfg_scale, loss, index)
    if q.dtype == torch.float64:
        return reference.guided_feature_loss(q, f_cond, f_null, weight, cfg_scale, loss, index)
    value: Tensor = OPS.guided_feature_loss(_wide_enough(q), f_cond, f_null, weight, cfg_scale, loss, index)[0]
    return value


def cfg_extrapolate(f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> Tensor:
    """f_∅ + ω·(f_y − f_∅) in f_cond's dtype and shape; gradients to both."""
    checks.extrapolated("cfg_extrapolate", f_cond, f_null, cfg_scale)
    if f_cond.dtype == torch.float64:
        return reference.cfg_extrapolate(f_cond, f_null, cfg_scale)
    f: Tensor = OPS.cfg_extrapolate(f_cond, f_null, cfg_scale)
    return f


def qk_norm(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised over head_dim, and v, contiguous (B, H, N, d), from qkv (B, N, 3, H, d); gradients to all."""
    checks.packed_affine("qk_norm", qkv, eps, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    if qkv.dtype == torch.float64:
        return reference.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps)
    q, k, v, _ = OPS.qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps)
    return q, k, v


def attention(qkv: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d)·v (B, N, H, d) from the packed projection (B, N, 3, H, d); its gradient comes packed too.

    csrc takes float32, and multiples of 32 for N and d; anything else is computed by plain PyTorch.
    """
    checks.packed("attention", qkv)
    if qkv.dtype != torch.float32 or qkv.shape[1] % 32 or qkv.shape[-1] % 32:
        return reference.attention(qkv)
    out: Tensor = OPS.attention(qkv.contiguous())[0]
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·Wᵀ + bias (…, M) in x's dtype; gradients to all. Small layers, and all on CUDA or under autocast, are
    PyTorch's own."""
    checks.linear("linear", x, weight, bias)
    if torch.is_autocast_enabled(x.device.type) or not onednn.pays(x, weight):
        return reference.linear(x, weight, bias)
    y: Tensor = OPS.linear(x, weight, bias)
    return y


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form in x's dtype, any shape; gradient to x."""
    checks.elementwise("gelu_tanh", x)
    if x.dtype == torch.float64:
        return reference.gelu_tanh(x)
    return OPS.gelu_tanh(x)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """√ Σ g² over all tensors, a 0-dim float32 tensor on their device; independent of order, grouping and threads."""
    checks.gradients("grad_norm", grads)
    norm: Tensor = OPS.grad_norm(list(grads)) if grads else reference.grad_norm(grads)
    return norm


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    grad_norm: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    max_norm: float,
) -> None:
    """One AdamW step, clipped, with EMA and low-precision copies, in place; none at all if grad_norm is not finite."""
    checks.optimiser(
        "adamw_ema_",
        params,
        {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        {"emas": emas, "copies": copies},
        {"step": step, "grad_norm": grad_norm, "lr": lr},
    )
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, emas, copies)]
    OPS.adamw_ema_(*lists, step, grad_norm, lr, beta1, beta2, eps, weight_decay, ema_decay, max_norm)
