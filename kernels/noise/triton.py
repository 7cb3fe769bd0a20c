"""Draws and noisy latents in one Triton launch: the bits of `definition.py`. Needs torch and Triton only.

One program draws a chunk of one sample; nothing but the chunk's place, the ordinal and the key enters a draw. The
arithmetic is that of the definition, operation by operation: the launch turns fused multiply-adds off, square roots
are those rounded to nearest, and uint32 wraps where the definition masks int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import on_gpu
from ..common.rows import cdiv
from . import definition

BLOCKS = 256
"""The most Philox blocks that a program draws of each of the two normals, four numbers each."""

NOISE, POSTERIOR = tl.constexpr(definition.NOISE), tl.constexpr(definition.POSTERIOR)
SQRT_HALF = tl.constexpr(definition.SQRT_HALF)
LN_HIGH, LN_LOW = (tl.constexpr(part) for part in definition.TWO_LN2)
LOG, SINE, COSINE = (tl.constexpr(part) for part in (definition.LOG, definition.SINE, definition.COSINE))


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    value = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        value = value * x + COEFFICIENTS[DEGREE - i]
    return value


@triton.jit
def _minus_two_log(word):
    """−2·ln((word | 1)·2⁻³²). The shift by e = 32 is made in two."""
    odd = word | 1
    e = (odd.to(tl.float32).to(tl.int32, bitcast=True) - SQRT_HALF) >> 23
    last = e >> 5
    power = (tl.full(e.shape, 1, tl.uint32) << (e - last).to(tl.uint32)) << last.to(tl.uint32)
    f = (odd - power).to(tl.int32, bitcast=True).to(tl.float32) * ((127 - e) << 23).to(tl.float32, bitcast=True)
    n = (32 - e).to(tl.float32)
    return n * LN_HIGH + ((f * f * _polynomial(f, LOG, 8) + n * LN_LOW) - 2.0 * f)


@triton.jit
def _cos_sin(v):
    square = v * v
    return _polynomial(square, COSINE, 4), v * _polynomial(square, SINE, 3)


@triton.jit
def _box_muller(radius_word, angle_word):
    radius = tl.sqrt_rn(_minus_two_log(radius_word))
    quarter = ((angle_word + 0x20000000) >> 30).to(tl.int32)
    turn = (angle_word - (quarter.to(tl.uint32) << 30)).to(tl.int32, bitcast=True)
    cos, sin = _cos_sin(turn.to(tl.float32) * 2.3283064365386963e-10)
    across = (quarter & 1) != 0
    first, second = tl.where(across, sin, cos), tl.where(across, cos, sin)
    return (
        radius * (1 - ((quarter + 1) & 2)).to(tl.float32) * first,
        radius * (1 - (quarter & 2)).to(tl.float32) * second,
    )


@triton.jit
def _normals(block, low, high, PURPOSE: tl.constexpr, key0, key1):
    """The four normals of each Philox block, in their order: (4 · blocks,)."""
    zero = block * 0
    w0, w1, w2, w3 = tl.philox_impl(block, zero + low, zero + high, zero + PURPOSE, key0, key1)
    a, b = _box_muller(w0, w1)
    c, d = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _coefficients(t, PATH: tl.constexpr):
    """α, σ, dα/dt, dσ/dt."""
    if PATH == "linear":
        return 1.0 - t, t, -1.0, 1.0
    else:
        late = t > 0.5
        first, second = _cos_sin(tl.where(late, 1.0 - t, t) * 0.25)
        cos, sin = tl.where(late, second, first), tl.where(late, first, second)
        return cos, sin, sin * -1.5707963267948966, cos * 1.5707963267948966


@on_gpu
@triton.jit(do_not_specialize=["key0", "key1"])
def _noisy_latents_kernel(
    moments_ptr, ordinals_ptr, t_ptr, x_ptr, x_t_ptr, velocity_ptr, noise_ptr, key0, key1, count,
    SCALE: tl.constexpr, PATH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One chunk of 4 · BLOCKS of a sample's `count` numbers; keys are the halves of the seed."""
    chunks = tl.cdiv(count, 4 * BLOCKS)
    sample, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    ordinal = tl.load(ordinals_ptr + sample)
    low, high = ordinal.to(tl.uint32), (ordinal >> 32).to(tl.uint32)
    first, second = key0.to(tl.uint32), key1.to(tl.uint32)
    block = (chunk * BLOCKS + tl.arange(0, BLOCKS)).to(tl.uint32)
    xi = _normals(block, low, high, POSTERIOR, first, second)
    noise = _normals(block, low, high, NOISE, first, second)
    alpha, sigma, d_alpha, d_sigma = _coefficients(tl.load(t_ptr + sample), PATH)

    at = chunk * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    inside = at < count
    mean = tl.load(moments_ptr + sample * 2 * count + at, mask=inside, other=0.0).to(tl.float32)
    std = tl.load(moments_ptr + sample * 2 * count + count + at, mask=inside, other=0.0).to(tl.float32)
    x = (mean + std * xi) * SCALE
    out = sample * count + at
    tl.store(x_ptr + out, x, mask=inside)
    tl.store(x_t_ptr + out, alpha * x + sigma * noise, mask=inside)
    tl.store(velocity_ptr + out, d_alpha * x + d_sigma * noise, mask=inside)
    tl.store(noise_ptr + out, noise, mask=inside)


def _half(seed: int) -> int:
    """The lowest 32 bits of a seed as an int32: one type whatever the seed, for which nothing is compiled anew."""
    return (seed + 2**31) % 2**32 - 2**31


def noisy_latents(
    moments: Tensor, ordinals: Tensor, t: Tensor, seed: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ x, x_t, velocity, noise (B, C, H, W) float32, from moments (B, 2C, H, W) of any strides."""
    batch, channels, height, width = moments.shape
    made = [torch.empty((batch, channels // 2, height, width), dtype=torch.float32, device=moments.device)
            for _ in range(4)]  # fmt: skip
    count = channels // 2 * height * width
    blocks = min(max(triton.next_power_of_2(cdiv(count, 4)), 32), BLOCKS)
    if batch:
        _noisy_latents_kernel[(batch * cdiv(count, 4 * blocks),)](
            moments.contiguous(), ordinals.contiguous(), t.contiguous(), *made, _half(seed), _half(seed >> 32), count,
            SCALE=scale, PATH=path, BLOCKS=blocks, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    x, x_t, velocity, noise = made
    return x, x_t, velocity, noise


WIDTHS = (0,)
CEILINGS = {"noisy_latents": 64}
"""What `resources.py` compiles, which does not depend on a width, and the most registers a thread may take."""


def resource_calls(meta: Callable[..., Tensor], width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """float16 moments, as they are stored."""
    moments, ordinals = meta(8, 8, 32, 32, dtype=torch.float16), meta(8, dtype=torch.int64)
    t = meta(8, dtype=torch.float32)
    yield "noisy_latents", lambda: noisy_latents(moments, ordinals, t, 7, 0.18215, "linear")
