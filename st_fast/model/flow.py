"""The path from data (t = 0) to noise (t = 1), its velocity, and how t is drawn. Pure functions.

Flow matching as in SiT (arXiv 2401.08740), with time from data to noise (docs/method.md): x_t = α(t)·x + σ(t)·ε,
v = dx_t/dt.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.kernels.noise.definition import PATHS, coefficients
from st_fast.recipe.keys import Shift
from st_fast.recipe.times import shifted

__all__ = [
    "PATHS",
    "TIMES",
    "coefficients",
    "denoising_loss",
    "direction_loss",
    "interpolate",
    "sample_times",
    "velocity_of_x",
]

TIMES = ("uniform", "lognormal", "stratified", "logit_normal")
LEAST_TIME = 0.05
LEAST_LENGTH = 1e-2
"""Of a velocity's vector, as its direction is taken. A network whose last layer starts at zero predicts 0, where with
PyTorch's 1e-8 the gradient is 10⁸ long: without clipping AdamW's exp_avg_sq has it for tens of thousands of steps."""


def interpolate(x: Tensor, noise: Tensor, t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """x, noise (B, C, H, W), t (B,) or each pixel's (B, 1, H, W) → x_t and the velocity target v, both (B, C, H, W)."""
    times = t.view(-1, 1, 1, 1) if t.ndim == 1 else t
    alpha, sigma, d_alpha, d_sigma = coefficients(times, path)
    return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def velocity_of_x(predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity (x_t − x̂) / t that follows from a predicted clean latent x̂, on the linear path, in float32.

    predicted, x (B, C, H, W), t (B,) or each pixel's (B, 1, H, W). Below LEAST_TIME that is what is divided by
    (arXiv 2511.13720, where the loss is the velocity's, too).
    """
    times = t.float().clamp(min=LEAST_TIME)
    return (x.float() - predicted.float()) / (times.view(-1, 1, 1, 1) if t.ndim == 1 else times)


def denoising_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean over C, H, W of (v̂ − v)², per sample, in float32: (B, C, H, W) → (B,)."""
    return (prediction.float() - velocity.float()).square().mean((1, 2, 3))


def direction_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean over H, W of 1 − cos(v̂, v) over the channels, per sample, in float32: (B, C, H, W) → (B,).

    LightningDiT's velocity direction loss (arXiv 2501.01423), but for vectors shorter than LEAST_LENGTH.
    """
    return (1 - F.cosine_similarity(prediction.float(), velocity.float(), dim=1, eps=LEAST_LENGTH)).mean((1, 2))


def sample_times(
    seed: int, step: int, place: np.ndarray, batch_size: int, time: str, path: str, group: int = 0,
    mean: float = 0.0, std: float = 1.0, shift: Shift = 1.0,
) -> Tensor:  # fmt: skip
    """t in (0, 1) for the given places (B,) of a global batch, on the host: a pure function of (seed, step, place).

    Those of another `group` of tokens than the first are independent of the first one's, and drawn alike.

    uniform: t = u. lognormal: σ = exp(n), t = σ/(1+σ) on the linear path, (2/π)·atan σ on the cosine path (EDM's
    noise levels). stratified: one uniform draw in each of batch_size equal bins, shuffled. logit_normal: of `mean` and
    `std`, the quantiles of stratified draws. All of them are then shifted. Returns (B,) float32.
    """
    t = _unshifted(seed, step, place, batch_size, time, path, group, mean, std)
    return t if shift == 1.0 else shifted(t.double(), shift).float().clamp_max(1 - 2.0**-24)


def _unshifted(
    seed: int, step: int, place: np.ndarray, batch_size: int, time: str, path: str, group: int, mean: float, std: float
) -> Tensor:
    ordinals = torch.from_numpy(step * batch_size + place)
    purpose, column = (Purpose.GROUP_TIME, group - 1) if group else (Purpose.TIME, 0)
    if time == "lognormal":
        sigma = random.normal(seed, purpose, ordinals, (column + 1,))[:, column].exp()
        return sigma / (1 + sigma) if path == "linear" else torch.atan(sigma) * (2 / math.pi)
    u = random.uniform(seed, purpose, ordinals, column + 1)[:, column]
    if time == "uniform":
        return u
    if time in ("stratified", "logit_normal"):
        bins = torch.from_numpy(random.strata(seed, step, batch_size, group)[place])
        # In float64: (bin + u) / B rounded to float32 at once keeps every draw inside its bin.
        share = (bins.double() + u.double()) / batch_size
        if time == "logit_normal":
            share = torch.sigmoid(mean + std * torch.special.ndtri(share))
        return share.float().clamp(2.0**-25, 1 - 2.0**-24)
    raise ValueError(f"time = {time!r}: one of {', '.join(TIMES)}")
