"""What the definitions share."""

from __future__ import annotations

import torch
from torch import Tensor


def up(x: Tensor) -> Tensor:
    """The computing dtype: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def norm_backward(dh: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    """The gradient through h = (x − mean)·rstd over the last axis."""
    return (dh - dh.mean(-1, keepdim=True) - h * (dh * h).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
