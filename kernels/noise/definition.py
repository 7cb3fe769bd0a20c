"""Draws as a pure function of (seed, purpose, ordinal), bit for bit the same on every device, and noisy latents.

Bits come from Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator. Everything after them is a fixed
sequence of single float32 additions, multiplications and square roots, each rounded to nearest as IEEE 754 has it, and
of integer operations; no library function and no fused multiply-add takes part. csrc and Triton do the same sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOISE, POSTERIOR = 1, 2
"""The purposes of the two draws of a noisy latent; `st_fast.core.random.Purpose` has the others."""

PATHS = ("linear", "cosine")

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

SQRT_HALF = 0x3F3504F3
"""The bits of √½ in float32."""
TWO_LN2 = (1.38629150390625, 2.857213530660374e-06)
"""2·ln 2 in two parts: the first times an integer up to 32 is exact in float32."""
LOG = (0.9999995231628418, -0.6666667461395264, 0.5000474452972412, -0.40003588795661926, 0.33187416195869446,
       -0.28354132175445557, 0.2669579088687897, -0.2593565881252289, 0.149336576461792)  # fmt: skip
"""(2f − 2·ln(1 + f)) / f² for 1 + f in √½ … √2, in ascending powers of f; error 2e-9 of the logarithm."""
SINE = (6.2831854820251465, -41.34176254272461, 81.6053695678711, -75.87133026123047)
"""sin(2πv) / v for |v| ≤ 1/8 in powers of v²; relative error 3e-8."""
COSINE = (1.0, -19.739208221435547, 64.93917083740234, -85.42823791503906, 58.76472473144531)
"""cos(2πv) for |v| ≤ 1/8 in powers of v²; error 5e-10."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit counter words (int64 tensors, broadcastable) → four 32-bit words (int64 tensors)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, purpose: int, ordinals: Tensor, count: int) -> Tensor:
    """(B,) → (B, count) 32-bit words as int64: row b depends on (seed mod 2⁶⁴, purpose, ordinals[b]) alone."""
    blocks = torch.arange((count + 3) // 4, device=ordinals.device)[None, :]
    ordinal = ordinals.to(torch.int64)[:, None]
    counter = (blocks, ordinal & _MASK, (ordinal >> 32) & _MASK, torch.full_like(ordinal, purpose))
    made = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*made), dim=-1).flatten(1)[:, :count]


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, every operation rounded by itself."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def minus_two_log(word: Tensor) -> Tensor:
    """−2·ln u, at least 0, for the uniform u = (word | 1)·2⁻³² in (0, 1): 32-bit words as int64 → float32, 2 ulp.

    word | 1 = (1 + f)·2ᵉ with 1 + f in √½ … √2, so that nothing cancels; f is rounded once.
    """
    odd = word | 1
    e = (odd.float().view(torch.int32) - SQRT_HALF) >> 23  # 0 … 32
    f = (odd - (torch.ones_like(odd) << e)).float() * ((127 - e) << 23).view(torch.float32)
    n = (32 - e).float()
    return n * TWO_LN2[0] + ((f * f * _polynomial(f, LOG) + n * TWO_LN2[1]) - 2.0 * f)


def cos_sin(v: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of v turns, |v| ≤ 1/8, float32: 2 ulp."""
    square = v * v
    return _polynomial(square, COSINE), v * _polynomial(square, SINE)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals of two 32-bit words (int64 tensors), float32: at most 6.7 in magnitude."""
    # On CPUs PyTorch's float32 roots are not rounded to nearest; double ones, rounded once more, are.
    radius = minus_two_log(radius_word).double().sqrt().float()
    quarter = (angle_word + 2**29) >> 30  # the nearest quarter of a turn, 0 … 4
    cos, sin = cos_sin((angle_word - (quarter << 30)).float() * 2.0**-32)
    across = (quarter & 1).bool()
    cos, sin = torch.where(across, sin, cos), torch.where(across, cos, sin)
    return (
        radius * (1 - ((quarter + 1) & 2)).float() * cos,
        radius * (1 - (quarter & 2)).float() * sin,
    )


def open_uniform(word: Tensor) -> Tensor:
    """32-bit words as int64 → float32 in (0, 1): the middle of one of 2²⁴ bins, rounded; that of the last is 1 − 2⁻²⁴.

    From ½ on a middle lies between two float32 numbers and rounds to the even one, which would be 1 for the last.
    """
    return ((word >> 8).to(torch.float32) * 2.0**-24 + 2.0**-25).clamp(max=1 - 2.0**-24)


def uniform(seed: int, purpose: int, ordinals: Tensor, count: int = 1) -> Tensor:
    """(B, count) float32 uniforms in (0, 1), one row an ordinal. `ordinals` (B,) int64 sets the device."""
    return open_uniform(words(seed, purpose, ordinals, count))


def normal(seed: int, purpose: int, ordinals: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32 standard normals by Box–Muller, one row an ordinal. `ordinals` (B,) int64 sets the device."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    drawn = words(seed, purpose, ordinals, 2 * pairs).view(-1, pairs, 2)
    values = torch.stack(box_muller(drawn[..., 0], drawn[..., 1]), dim=-1).flatten(1)
    return values[:, :count].reshape(-1, *shape)


def coefficients(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """α, σ, dα/dt, dσ/dt at t in [0, 1], each of t's shape and dtype. ValueError for an unknown path."""
    if path == "linear":
        one = torch.ones_like(t)
        return 1 - t, t, -one, one
    if path == "cosine":
        half_pi = math.pi / 2
        if t.dtype == torch.float32:
            late = t > 0.5  # α and σ change places there: 1 − t is exact
            cos, sin = cos_sin(torch.where(late, 1 - t, t) * 0.25)
            cos, sin = torch.where(late, sin, cos), torch.where(late, cos, sin)
        else:
            cos, sin = torch.cos(half_pi * t), torch.sin(half_pi * t)
        return cos, sin, -half_pi * sin, half_pi * cos
    raise ValueError(f"path = {path!r}: one of {', '.join(PATHS)}")


def noisy_latents(
    moments: Tensor, ordinals: Tensor, t: Tensor, seed: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = scale·(μ + σ·ξ), x_t = α(t)·x + σ(t)·ε, the velocity dx_t/dt, and ε, each (B, C, H, W) float32.

    moments (B, 2C, H, W) holds μ and σ; ordinals (B,) int64 are the counters of the normals ξ and ε; t (B,) float32.
    """
    mean, std = moments.float().chunk(2, dim=1)
    x = scale * (mean + std * normal(seed, POSTERIOR, ordinals, mean.shape[1:]))
    noise = normal(seed, NOISE, ordinals, mean.shape[1:])
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in coefficients(t, path))
    return x, alpha * x + sigma * noise, d_alpha * x + d_sigma * noise, noise
