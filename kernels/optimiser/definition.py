"""Clipping, AdamW and the weight average in plain PyTorch: the definitions, which are also what the ops register."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NORM_CHUNK = 16384
"""Elements per partial sum of grad_norm: few enough that PyTorch sums them on one thread."""


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The global L2 norm of a list of gradients, any shapes and floating dtypes: √ Σ g².

    Exact to float32: each chunk of NORM_CHUNK elements is summed in float64, and the chunks' sums in ascending order,
    so neither threads nor the order or grouping of the tensors changes a bit. Returns a 0-dim float32 tensor; an empty
    list gives 0. NaN and Inf come through.
    """
    if not grads:
        return torch.zeros(())
    chunks = [chunk.double().square().sum() for g in grads for chunk in g.reshape(-1).split(NORM_CHUNK)]
    return torch.stack(chunks).sort().values.cumsum(0)[-1].sqrt().float()


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
    ema_warmup: bool = False,
) -> None:
    """One AdamW step (arXiv 1711.05101) with clipping by the global norm, then ema += (1 − decay)·(p − ema), in place.

    The order of `torch.optim.AdamW`: p ← p·(1 − lr·wd); m, v; p ← p − lr/(1 − β₁ᵗ)·m / (√v/√(1 − β₂ᵗ) + eps), with g
    scaled by min(1, max_norm / (grad_norm + 1e-6)) as `clip_grad_norm_` does (max_norm ≤ 0: not scaled).
    params, exp_avgs, exp_avg_sqs and emas float32; grads float32 or bfloat16; `emas` and `copies` one per parameter or
    empty; copies receive the new parameter in their own dtype. step (0-dim) counts completed steps. ema_warmup: the
    decay after n of them is min(ema_decay, (1 + n)/(10 + n)), as of TensorFlow's ExponentialMovingAverage. If grad_norm
    is NaN or Inf nothing changes, step included. Reading grad_norm, step and lr waits for the device.
    """
    if not torch.isfinite(grad_norm):
        return
    step.add_(1)
    t, rate = float(step), float(lr)
    clip = min(1.0, max_norm / (float(grad_norm) + 1e-6)) if max_norm > 0 else 1.0
    root = (1 - beta2**t) ** 0.5
    blend = max(1 - ema_decay, 9 / (9 + t)) if ema_warmup else 1 - ema_decay
    for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs)):
        g = grads[i].to(p.dtype) * clip
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, (v.sqrt() / root).add_(eps), value=-rate / (1 - beta1**t))
        if emas:
            emas[i].lerp_(p, blend)
        if copies:
            copies[i].copy_(p)
