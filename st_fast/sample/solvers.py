"""Solvers from noise at t = 1 to data at t = 0: ODE (Euler, Heun, dopri5) and SDE (Euler–Maruyama)."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.errors import UserError
from st_fast.core.random import Purpose
from st_fast.model import flow
from st_fast.sample.draw import Draw

Velocity = Callable[[Tensor, float], Tensor]
"""(x (B, C, S, S), t) → dx/dt (B, C, S, S)."""

Watch = Callable[[Tensor], None]
"""Called with x (B, C, S, S) after each step."""

LAST_SDE_TIME = 0.04
"""From here REPA's SDE sampler makes its last, noiseless step to t = 0."""

DOPRI5_ATOL, DOPRI5_RTOL = 1e-6, 1e-3
"""SiT's tolerances (arXiv 2401.08740)."""


def unwatched(x: Tensor) -> None:
    """Does nothing."""


def euler(velocity: Velocity, x: Tensor, steps: int, watch: Watch = unwatched) -> Tensor:
    """Euler's method in equal steps from t = 1 to 0."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, following in itertools.pairwise(times):
        x = x + (following - t) * velocity(x, t)
        watch(x)
    return x


def heun(velocity: Velocity, x: Tensor, steps: int, watch: Watch = unwatched) -> Tensor:
    """Heun's second-order method in equal steps; two evaluations a step."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, following in itertools.pairwise(times):
        slope = velocity(x, t)
        ahead = velocity(x + (following - t) * slope, following)
        x = x + (following - t) * 0.5 * (slope + ahead)
        watch(x)
    return x


def dopri5(
    velocity: Velocity, x: Tensor, steps: int, jumps: Sequence[float] = (), watch: Watch = unwatched,
    atol: float = DOPRI5_ATOL, rtol: float = DOPRI5_RTOL,
) -> Tensor:  # fmt: skip
    """Dormand and Prince's method with steps of its own choosing (torchdiffeq); `watch` sees `steps` equal times.

    A step is as long as the sample of the batch that is hardest to follow allows (the error's norm is the largest
    over the samples), so the tolerances hold for each of them, and a sample's value depends, within the tolerances,
    on the batch it is in. The velocity may jump at the times `jumps`. UserError where torchdiffeq is missing.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError(
            f"sampler = 'dopri5': torchdiffeq can't be imported ({error}): pip install st_fast[ode]"
        ) from error

    def hardest(error: Tensor) -> Tensor:
        return error.flatten(1).square().mean(dim=1).sqrt().amax()

    times = [1.0, 0.0] if watch is unwatched else torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    inside = sorted({t for t in jumps if 0 < t < 1})
    # A step ends at 0: the solver would otherwise look beyond it and interpolate, where the model knows nothing.
    options = {"norm": hardest, "step_t": torch.tensor([0.0], dtype=torch.float64, device=x.device)} | (
        {"jump_t": torch.tensor(inside, dtype=torch.float64, device=x.device)} if inside else {}
    )
    found: Tensor = odeint(
        lambda t, state: velocity(state, float(t)), x, torch.tensor(times, dtype=torch.float64, device=x.device),
        rtol=rtol, atol=atol, method="dopri5", options=options,
    )  # fmt: skip
    for state in found[1:]:
        watch(state)
    return found[-1]


def euler_maruyama(
    velocity: Velocity, x: Tensor, steps: int, path: str, draw: Draw, watch: Watch = unwatched
) -> Tensor:
    """The reverse SDE with diffusion 2t of SiT (arXiv 2401.08740), REPA's times: 1 → 0.04, then a noiseless step to 0.

    With s the score, dx = (v − t·s)·dt + √(2t)·dW; s follows from v and the path.
    """
    times = [*torch.linspace(1, LAST_SDE_TIME, steps, dtype=torch.float64).tolist(), 0.0]
    for number, (t, following) in enumerate(itertools.pairwise(times)):
        step = following - t
        v = velocity(x, t)
        x = x + step * (v - t * score(v, x, t, path))
        if following > 0:
            noise = random.normal(draw.seed, Purpose.SAMPLE_PATH, draw.ordinals * steps + number, x.shape[1:])
            x = x + (2 * t * -step) ** 0.5 * noise
        watch(x)
    return x


def score(v: Tensor, x: Tensor, t: float, path: str) -> Tensor:
    """∇ log p_t(x) from the velocity: (α/α'·v − x) / (σ² − α/α'·σ'·σ); −ε̂/σ in other words."""
    alpha, sigma, d_alpha, d_sigma = (float(c) for c in flow.coefficients(torch.tensor(t, dtype=torch.float64), path))
    # α/α' diverges nowhere on (0, 1] but α' → 0 at t = 0 on the cosine path; both sides are multiplied by α'.
    return (alpha * v - d_alpha * x) / (d_alpha * sigma**2 - alpha * d_sigma * sigma)
