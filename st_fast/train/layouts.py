"""Which tokens of a sample are in which group, at which time, and which a route keeps: drawn from ordinals alone."""

import numpy as np
import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.model import flow
from st_fast.model.layout import Layout, Route
from st_fast.recipe.schema import Flow
from st_fast.recipe.tokens import TokenGroups, TokenPlan


def draw_times(groups: TokenGroups | None, settings: Flow, seed: int, step: int, size: int) -> Tensor:
    """The times of a global batch of `size` at a step, on the host: (size,), or each group's (size, G).

    The first group's are those that an image would have as a whole; a sample that is one group has them in all.
    """
    places, count = np.arange(size), 1 if groups is None else len(groups.shares)
    how, law = (settings.time, settings.path), (settings.time_mean, settings.time_std)
    drawn = [flow.sample_times(seed, step, places, size, *how, g, *law, settings.shift) for g in range(count)]
    if groups is None:
        return drawn[0]
    t = torch.stack(drawn, dim=1)
    if groups.whole > 0:
        whole = whole_samples(groups.whole, seed, torch.arange(step * size, (step + 1) * size))
        t = torch.where(whole[:, None], t[:, :1], t)
    return t


def whole_samples(chance: float, seed: int, ordinals: Tensor) -> Tensor:
    """(B,) bool: which samples are one group."""
    return random.uniform(seed, Purpose.WHOLE_SAMPLE, ordinals)[:, 0] < chance


def draw_layout(plan: TokenPlan, grid: tuple[int, int], seed: int, ordinals: Tensor) -> Layout:
    """The layout of samples with these ordinals (B,) int64, on their device: a random order of each one's tokens.

    The first `lengths[0]` of it are the first group, and so on; the first of a group are those that the route keeps.
    """
    rows, columns = grid
    keys = random.uniform(seed, Purpose.TOKEN_ORDER, ordinals, rows * columns)  # (B, N)
    route = None
    if plan.route is not None:
        route = Route(plan.route.first, plan.route.last, plan.kept)
        if plan.route.structured:
            keys = keys + _later_in_their_square(keys, grid)
    order = keys.argsort(dim=1, stable=True)
    whole = whole_samples(plan.whole, seed, ordinals) if plan.whole > 0 else None
    dropped = None
    if plan.path_drop > 0:
        dropped = random.uniform(seed, Purpose.PATH_DROP, ordinals)[:, 0] < plan.path_drop
    return Layout(order, plan.lengths, plan.separated, whole, route, dropped)


def _later_in_their_square(keys: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N) keys → 1 for the three tokens of each 2 × 2 whose keys are not its least, 0 for the one that is."""
    rows, columns = grid
    squares = keys.view(-1, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 2, 4).flatten(3)  # (B, h/2, w/2, 4)
    later = torch.ones_like(squares).scatter_(3, squares.argmin(3, keepdim=True), 0.0)
    return later.unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4).reshape_as(keys)
