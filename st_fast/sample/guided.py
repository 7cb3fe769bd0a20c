"""Latents from noise: the velocity with classifier-free guidance, and the solver that the settings name."""

from collections.abc import Iterator

import torch
from torch import Tensor

from st_fast.model import SiT
from st_fast.recipe.schema import Sample
from st_fast.sample import solvers
from st_fast.sample.draw import Draw, balanced, starting_noise
from st_fast.sample.solvers import Velocity, Watch, unwatched


def guided_velocity(model: SiT, labels: Tensor, settings: Sample) -> Velocity:
    """v̂ with classifier-free guidance (arXiv 2207.12598) where t lies in `cfg_range`, both branches as one batch.

    v = v_∅ + ω·(v_y − v_∅); outside the range, or with ω = 1, just v_y.
    """
    low, high = settings.cfg_range
    null = torch.full_like(labels, model.null_label)

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if settings.cfg_scale == 1.0 or not low <= t <= high:
            return model(x, times, labels)[0].float()
        both = model(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat((labels, null)))[0].float()
        conditional, unconditional = both.chunk(2)
        return unconditional + settings.cfg_scale * (conditional - unconditional)

    return velocity


@torch.no_grad()
def sample_from(model: SiT, x: Tensor, draw: Draw, settings: Sample, path: str, watch: Watch = unwatched) -> Tensor:
    """(B, C, S, S) float32 scaled latents for noise x (B, C, S, S). The model must be in eval mode."""
    velocity = guided_velocity(model, draw.labels, settings)
    if settings.sampler == "euler":
        return solvers.euler(velocity, x, settings.steps, watch)
    if settings.sampler == "heun":
        return solvers.heun(velocity, x, settings.steps, watch)
    if settings.sampler == "dopri5":
        jumps = () if settings.cfg_scale == 1.0 else settings.cfg_range
        return solvers.dopri5(velocity, x, settings.steps, jumps, watch)
    return solvers.euler_maruyama(velocity, x, settings.steps, path, draw, watch)


def sample(model: SiT, draw: Draw, settings: Sample, path: str) -> Tensor:
    """(B, C, S, S) float32 scaled latents for the draw. The model must be in eval mode."""
    return sample_from(model, starting_noise(draw, model.config), draw, settings, path)


def sample_batches(model: SiT, seed: int, count: int, settings: Sample, path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and labels of samples 0 … count − 1, `settings.batch_size` at a time."""
    device = model.pos_embed.device
    for first in range(0, count, settings.batch_size):
        size = min(settings.batch_size, count - first)
        draw = balanced(seed, first, size, model.config.num_classes, device)
        yield sample(model, draw, settings, path), draw.labels
