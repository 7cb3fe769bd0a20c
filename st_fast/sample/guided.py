"""Latents from noise: the velocity with guidance, and solvers from t = 1 (noise) to t = 0 (data).

Guidance is classifier-free, Internal Guidance, or both: the latter makes each branch's velocity, the former joins them.

ODE solvers (Euler, Heun, dopri5) and an SDE solver (Euler–Maruyama); the settings say which one samples.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.errors import UserError, how_to_install
from st_fast.core.random import Purpose
from st_fast.model import DiffusionTransformer, flow
from st_fast.model.transformer import INTERNAL
from st_fast.recipe.keys import Shift
from st_fast.recipe.schema import Sample
from st_fast.recipe.times import shifted, with_shift
from st_fast.sample.contrast import Correction
from st_fast.sample.draw import Draw, balanced, starting_noise
from st_fast.sample.internal import EarlyHead
from st_fast.sample.prompts import Prompts

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


def solver_times(count: int, last: float, shift: Shift) -> list[float]:
    """`count` times from 1 to `last`, equally spaced before they are shifted."""
    return [shifted(t, shift) for t in torch.linspace(1, last, count, dtype=torch.float64).tolist()]


def euler(
    velocity: Velocity, x: Tensor, steps: int, watch: Watch = unwatched, heun: bool = False, shift: Shift = 1.0
) -> Tensor:
    """Euler's method in equal steps from t = 1 to 0, or Heun's second-order one, with two evaluations a step.

    The times between the steps are shifted.
    """
    for t, following in itertools.pairwise(solver_times(steps + 1, 0, shift)):
        slope = velocity(x, t)
        if heun:
            slope = 0.5 * (slope + velocity(x + (following - t) * slope, following))
        x = x + (following - t) * slope
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
    odeint = torchdiffeq_odeint()

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


def torchdiffeq_odeint() -> Any:
    """torchdiffeq's solver; UserError where it is missing."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError(
            f"sampler = 'dopri5': torchdiffeq can't be imported ({error}): {how_to_install('ode')}"
        ) from error
    return odeint


def euler_maruyama(
    velocity: Velocity, x: Tensor, steps: int, path: str, draw: Draw, watch: Watch = unwatched, shift: Shift = 1.0
) -> Tensor:
    """The reverse SDE with diffusion 2t of SiT (arXiv 2401.08740), REPA's times: 1 → 0.04, then a noiseless step to 0.

    All of the times are shifted.

    With s the score, dx = (v − t·s)·dt + √(2t)·dW; s follows from v and the path.
    """
    times = [*solver_times(steps, LAST_SDE_TIME, shift), 0.0]
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


def internally_guided(
    model: DiffusionTransformer, settings: Sample, head: EarlyHead | None = None
) -> Callable[[Tensor, float, Tensor, Velocity], Tensor]:
    """(x (B, C, H, W), t, condition (B, …), corrected) → v̂ with Internal Guidance (arXiv 2512.24176) in its range.

    v = v_i + w·(v_f − v_i), v_f the network's output, `corrected` with t, and v_i its internal head's, or that of
    `head`, in one pass; outside `internal_range`, or with w = 1, just v_f. Float32.
    """
    scale, (low, high) = settings.internal_guidance, settings.internal_range

    def velocity(x: Tensor, t: float, condition: Tensor, corrected: Velocity) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if scale == 1.0 or not low <= t <= high:
            return corrected(model(x, times, condition)[0].float(), t)
        final, tapped = model(x, times, condition, INTERNAL if head is None else head.block)
        internal = (tapped if head is None else head.module.latents(tapped, model.grid_of(x))).float()
        return internal + scale * (corrected(final.float(), t) - internal)

    return velocity


def guided_velocity(
    model: DiffusionTransformer, condition: Tensor, settings: Sample, negative: Tensor | None = None,
    correction: Correction | None = None, head: EarlyHead | None = None,
) -> Velocity:  # fmt: skip
    """v̂ with classifier-free guidance (arXiv 2207.12598) where t lies in `cfg_range`, both branches as one batch.

    v = v_∅ + ω·(v_y − v_∅); outside the range, or with ω = 1, just v_y. By path drop (SPRINT) v_∅ is of the network
    without the blocks within its fusion, in a pass of its own. `negative` (B, …) takes the place of ∅. Each
    of the two is `internally_guided`. `correction` is applied to each branch's output that has the bias, before they
    are combined.
    """
    low, high = settings.cfg_range
    branch = internally_guided(model, settings, head)
    null = model.null_condition(len(condition)) if negative is None else negative
    null_biased = negative is not None or (correction is not None and correction.null)  # a negative is a condition

    def corrected(v: Tensor, t: float) -> Tensor:
        return correction(v, t) if correction is not None and correction.acts(t, settings) else v

    def of_two(v: Tensor, t: float) -> Tensor:
        """Of both branches as one batch."""
        if null_biased or correction is None:
            return corrected(v, t)
        conditional, unconditional = v.chunk(2)
        return torch.cat((corrected(conditional, t), unconditional))

    def velocity(x: Tensor, t: float) -> Tensor:
        if settings.cfg_scale == 1.0 or not low <= t <= high:
            return branch(x, t, condition, corrected)
        if settings.guidance == "path_drop":
            conditional = branch(x, t, condition, corrected)
            unconditional = model.without_path(x, torch.full((len(x),), t, device=x.device), null).float()
            unconditional = corrected(unconditional, t) if null_biased else unconditional
            return unconditional + settings.cfg_scale * (conditional - unconditional)
        conditional, unconditional = branch(x.repeat(2, 1, 1, 1), t, torch.cat((condition, null)), of_two).chunk(2)
        return unconditional + settings.cfg_scale * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample_from(
    model: DiffusionTransformer, x: Tensor, draw: Draw, settings: Sample, path: str, watch: Watch = unwatched,
    correction: Correction | None = None, head: EarlyHead | None = None,
) -> Tensor:  # fmt: skip
    """(B, C, S, S) float32 scaled latents for noise x (B, C, S, S). The model must be in eval mode.

    `head` stands in for an internal head that the model lacks, where the settings have Internal Guidance.
    """
    velocity = guided_velocity(model, draw.condition, settings, draw.negative, correction, head)
    shift = with_shift(settings, x.shape[1:]).shift
    if settings.sampler in ("euler", "heun"):
        return euler(velocity, x, settings.steps, watch, settings.sampler == "heun", shift)
    if settings.sampler == "dopri5":
        released = correction is not None and correction.how == "released"
        jumps: tuple[float, ...] = settings.cfg_range if released or settings.cfg_scale != 1.0 else ()
        jumps += settings.internal_range if settings.internal_guidance != 1.0 else ()
        return dopri5(velocity, x, settings.steps, jumps, watch)
    return euler_maruyama(velocity, x, settings.steps, path, draw, watch, shift)


def sample(
    model: DiffusionTransformer, draw: Draw, settings: Sample, path: str, correction: Correction | None = None,
    head: EarlyHead | None = None,
) -> Tensor:  # fmt: skip
    """(B, C, S, S) float32 scaled latents for the draw. The model must be in eval mode."""
    return sample_from(model, starting_noise(draw, model.config), draw, settings, path, unwatched, correction, head)


def sample_batches(
    model: DiffusionTransformer, seed: int, count: int, settings: Sample, path: str, prompts: Prompts | None = None,
    correction: Correction | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Latents and labels of samples 0 … count − 1, `settings.batch_size` at a time; classes, or prompts, in turn."""
    device = model.device
    classes = model.config.num_classes if prompts is None else len(prompts.texts)
    for first in range(0, count, settings.batch_size):
        size = min(settings.batch_size, count - first)
        draw = balanced(seed, first, size, classes, device, prompts)
        yield sample(model, draw, settings, path, correction), draw.labels
