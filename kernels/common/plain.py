"""What the definitions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

Lengths = Optional[Sequence[int]]
"""The sizes of the runs of consecutive tokens that share something, the same in all samples; None: there are none."""


def up(x: Tensor) -> Tensor:
    """The computing dtype: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def norm_backward(dh: Tensor, h: Tensor, rstd: Tensor, rms: bool = False) -> Tensor:
    """The gradient through h = (x − mean)·rstd over the last axis; rms: through h = x·rstd."""
    centred = dh if rms else dh - dh.mean(-1, keepdim=True)
    return (centred - h * (dh * h).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)


def with_bias_gradient(y: Tensor, bias: Tensor | None) -> Tensor:
    """y (…, D), the output of a layer that was called with `bias.detach()`: as it is, but the bias (D,) gets its
    gradient here, the sum of y's over all axes but the last."""
    return y if bias is None else y + (bias - bias.detach()).to(y.dtype)


def bias_gradient(dy: Tensor, bias: Tensor | None) -> Tensor:
    """→ the sum of dy (…, D) over all axes but the last, in the bias's dtype; an empty tensor without a bias."""
    return dy.new_empty(0) if bias is None else dy.sum(tuple(range(dy.dim() - 1))).to(bias.dtype)


def autocast(x: Tensor) -> bool:
    """Whether PyTorch's own layers would cast x now; never on devices without autocast."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
