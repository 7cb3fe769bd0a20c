"""How both pipelines draw: samplers, guidance, and what becomes of latents. Noise follows from (seed, sample number).

Plain PyTorch, as in st_fast, which wrote this file and is not needed.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from st_fast.core.random import Purpose
from st_fast.kernels.noise.definition import normal

SAMPLERS = ("euler", "heun", "sde")
LAST_SDE_TIME = 0.04
"""Where the SDE sampler, with diffusion 2t (arXiv 2401.08740), makes its last, noiseless step to t = 0."""
Velocity = Callable[[Tensor, float], Tensor]
"""v(x_t, t), guided, in float32."""


def solve(pipe: Any, x: Tensor, velocity: Velocity, sampler: str, steps: int, seed: int, numbers: Tensor) -> Tensor:
    """Noise x (B, C, S, S) at t = 1 → latents at t = 0, with the pipeline's progress bar.

    `sampler` is "euler", "heun" or "sde" (Euler-Maruyama), whose noise follows from `seed` and the samples' `numbers`
    (B,). ValueError for another one.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler = {sampler!r}: one of {', '.join(SAMPLERS)}")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    if sampler == "sde":
        times = [*torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    shift = pipe.config.shift
    times = [shift * t / (shift * t + (1 - t)) for t in times]
    for number, (t, following) in enumerate(pipe.progress_bar(list(itertools.pairwise(times)))):
        step, slope = following - t, velocity(x, t)
        if sampler == "heun":
            slope = 0.5 * (slope + velocity(x + step * slope, following))
        if sampler == "sde":
            slope = slope - t * score(slope, x, t, pipe.transformer.config.flow)
        x = x + step * slope
        if sampler == "sde" and following > 0:
            noise = normal(seed, Purpose.SAMPLE_PATH, numbers * steps + number, x.shape[1:])
            x = x + (2 * t * -step) ** 0.5 * noise
    return x


def guided(pipe: Any, condition: Tensor, null: Tensor, scale: float, internal: float = 1.0) -> Velocity:
    """The transformer's velocity, guided where t lies in the pipeline's range: v_null + scale * (v - v_null).

    Each of both is v_i + internal * (v - v_i) where t lies in the range of Internal Guidance (arXiv 2512.24176), v_i
    the internal head's velocity.
    """

    def branch(x: Tensor, t: float, condition: Tensor) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if internal == 1.0 or not pipe.config.internal_low <= t <= pipe.config.internal_high:
            return pipe.transformer(x, times, condition).float()  # type: ignore[no-any-return]
        final, shallow = (v.float() for v in pipe.transformer(x, times, condition, internal=True))
        return shallow + internal * (final - shallow)  # type: ignore[no-any-return]

    def velocity(x: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not pipe.config.guidance_low <= t <= pipe.config.guidance_high:
            return branch(x, t, condition)
        conditional, unconditional = branch(x.repeat(2, 1, 1, 1), t, torch.cat((condition, null))).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity


def internal_scale(pipe: Any, given: float | None) -> float:
    """The scale of Internal Guidance: as `given`, else the pipeline's. ValueError where there is no internal head."""
    scale = pipe.config.internal_guidance if given is None else given
    if scale != 1.0 and not pipe.transformer.config.internal_head:
        raise ValueError(f"internal_guidance = {scale}: this model has no internal head; 1 is possible")
    return float(scale)


def decoded(pipe: Any, x: Tensor, output_type: str) -> Any:
    """Latents to "pil", "np", "pt" or "latent"; without a VAE latents of 1 or 3 channels are pixels."""
    if output_type == "latent":
        return x
    config = pipe.transformer.config
    z = x / (config.latent_scale or 1.0)
    if config.latents_std:
        z = z * by_channel(config.latents_std, z)
    if config.latents_mean:
        z = z + by_channel(config.latents_mean, z)
    if pipe.vae is not None:
        shift = config.latent_shift
        z = z + ((getattr(pipe.vae.config, "shift_factor", None) or 0.0) if shift is None else shift)
        z = pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0].float()
    elif z.shape[1] not in (1, 3):
        raise ValueError("this pipeline has no VAE: pass vae=AutoencoderKL…, or output_type='latent'")
    pixels = (z + 1).mul(127.5).round().clamp(0, 255) / 255
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return pipe.numpy_to_pil(array) if output_type == "pil" else array


def by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """(C,) → (1, C, 1, 1) on the tensor's device."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[None, :, None, None]


def score(v: Tensor, x: Tensor, t: float, flow: str) -> Tensor:
    """The gradient of log p_t(x) from the velocity; with alpha, sigma and their derivatives on the flow's path."""
    angle = math.pi / 2 * t
    alpha, sigma, d_alpha, d_sigma = (
        (1 - t, t, -1.0, 1.0)
        if flow == "linear"
        else (math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle))
    )
    return (alpha * v - d_alpha * x) / (d_alpha * sigma**2 - alpha * d_sigma * sigma)
