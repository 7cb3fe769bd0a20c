"""noisy_latents: the public function with its checks, registration, and inputs to try it with.

It has no gradient: what it makes is data. For shapes and equations see `definition.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._ops import ops
from ..common import checks
from ..common.registry import Op, define
from ..common.trial import Draw, Inputs, Size
from . import definition

TRITON = __package__ + ".triton"


def noisy_latents(
    moments: Tensor, ordinals: Tensor, t: Tensor, seed: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x_t, the velocity and the noise of x_t, each (B, C, H, W) float32, the same bits on every device.

    moments (B, 2C, H, W), any strides; ordinals (B,) int64; t (B,) float32; of the seed its lowest 64 bits count.
    """
    _check("noisy_latents", moments, ordinals, t, scale, path)
    signed = (seed + 2**63) % 2**64 - 2**63  # as the op's schema takes it
    x, x_t, velocity, noise = ops.noisy_latents(moments, ordinals, t, signed, scale, path)
    return x, x_t, velocity, noise


def _check(op: str, moments: Tensor, ordinals: Tensor, t: Tensor, scale: float, path: str) -> None:
    checks.floating(op, moments=moments)
    checks.rank(op, "moments", moments, "(B, 2C, H, W)")
    if moments.shape[1] % 2:
        raise ValueError(f"{op}: moments has shape {tuple(moments.shape)}; an even number of channels is needed")
    checks.frozen(op, moments=moments, t=t)
    for name, tensor, dtype in (("ordinals", ordinals, torch.int64), ("t", t, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; {dtype} is needed")
        if tensor.device != moments.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on moments' device, {moments.device}")
        checks.shape(op, name, tensor, moments.shape[:1], "moments' (B,)")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale = {scale}; a finite number is needed")
    if path not in definition.PATHS:
        raise ValueError(f"{op}: path = {path!r}; one of {', '.join(definition.PATHS)} is needed")


def _fake(moments: Tensor, ordinals: Tensor, t: Tensor, seed: int, scale: float, path: str) -> tuple[Tensor, ...]:
    batch, channels, height, width = moments.shape
    return tuple(moments.new_empty((batch, channels // 2, height, width), dtype=torch.float32) for _ in range(4))


define(
    "noisy_latents",
    "(Tensor moments, Tensor ordinals, Tensor t, int seed, float scale, str path)"
    " -> (Tensor x, Tensor x_t, Tensor velocity, Tensor noise)",
    definition.noisy_latents,
    _fake,
    TRITON,
)


def _try(draw: Draw, size: Size) -> Inputs:
    """As many numbers as latents of four channels have in patches of 2 × 2."""
    moments = draw(size.batch, 8, 4, size.tokens)
    ordinals = torch.arange(size.batch, device=draw.device) + 2**33
    t = torch.linspace(0.1, 0.9, size.batch, device=draw.device)
    return Inputs((moments, ordinals, t, 7, 0.18215, "linear"), (), ())


def _bytes(size: Size, itemsize: int) -> float:
    """Reads two moments and writes four float32 for each of the 16 numbers of a token."""
    return 16.0 * size.batch * size.tokens * (2 * itemsize + 4 * 4)


DECLARED = {"noisy_latents": Op(noisy_latents, definition.noisy_latents, _try, data=_bytes)}
