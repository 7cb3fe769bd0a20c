"""Which tokens of a sample are in which group and which a route keeps: drawn from the samples' ordinals alone."""

import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.model.layout import Layout, Route
from st_fast.recipe.tokens import TokenPlan


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
    whole = None
    if plan.whole > 0:
        whole = random.uniform(seed, Purpose.WHOLE_SAMPLE, ordinals)[:, 0] < plan.whole
    return Layout(order, plan.lengths, plan.separated, whole, route)


def _later_in_their_square(keys: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N) keys → 1 for the three tokens of each 2 × 2 whose keys are not its least, 0 for the one that is."""
    rows, columns = grid
    squares = keys.view(-1, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 2, 4).flatten(3)  # (B, h/2, w/2, 4)
    later = torch.ones_like(squares).scatter_(3, squares.argmin(3, keepdim=True), 0.0)
    return later.unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4).reshape_as(keys)
