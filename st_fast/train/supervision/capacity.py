"""Fixed shapes for supervised rows: the number of rows of a pass, and the rows of weight 0 that fill it up.

The number of a micro-batch's times inside the t-range changes from step to step, but its distribution is known: a pass
has a fixed number of rows, and a step with more of them runs another pass of the same shape.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from st_fast.recipe.methods import Selection
from st_fast.recipe.schema import Flow
from st_fast.recipe.times import time_cdf


@dataclass(frozen=True)
class Capacity:
    """Rows of one pass, how many are expected to be supervised, and how many are expected to be run, all passes'."""

    rows: int
    supervised: float
    run: float


def capacity(selection: Selection, flow: Flow, whole: int, part: int) -> Capacity:
    """For micro-batches of `part` samples from global batches of `whole`: the rows that cost least on average.

    Stratified t, logit-normal too, fixes the number in a global batch to ±1, so where that is one micro-batch nothing
    ever overflows. Otherwise the number is hypergeometric (stratified) or binomial, and the capacity K weighs padding
    against further passes: the least K·E[max(1, ⌈M/K⌉)] with K at or above the mean.
    """
    if selection.mask == "released":
        return Capacity(part, part, part)
    ends = [time_cdf(flow, end) for end in selection.t_range]
    share = ends[1] - ends[0]
    if flow.time in ("stratified", "logit_normal"):
        # The equal bins of (0, 1) that the range touches: its ends may lie in bins that are partly inside.
        low, high = (math.floor(end * whole) for end in ends)
        inside = min(high, whole - 1) - low + 1
        if part == whole:
            return Capacity(inside, share * whole, inside)
        chances = _hypergeometric(whole, inside, part)
    else:
        chances = _binomial(part, share)
    counts = np.arange(part + 1)
    mean = float(counts @ chances)
    candidates = range(max(1, math.ceil(mean)), min(part, math.ceil(mean + 6 * math.sqrt(mean))) + 1)
    costs = {k: k * float(np.maximum(1, -(-counts // k)) @ chances) for k in candidates}
    best = min(costs, key=lambda k: (costs[k], k))
    return Capacity(best, mean, costs[best])


def _binomial(count: int, share: float) -> np.ndarray:
    """(count + 1,) chances of 0 … count successes."""
    share = min(max(share, 1e-12), 1 - 1e-12)
    logs = [_log_choose(count, m) + m * math.log(share) + (count - m) * math.log1p(-share) for m in range(count + 1)]
    return np.exp(logs)


def _hypergeometric(whole: int, inside: int, part: int) -> np.ndarray:
    """(part + 1,) chances that 0 … part of `part` places drawn from `whole` are among the `inside` ones."""
    total = _log_choose(whole, part)
    possible = range(max(0, part - (whole - inside)), min(part, inside) + 1)
    chances = np.zeros(part + 1)
    for m in possible:
        chances[m] = math.exp(_log_choose(inside, m) + _log_choose(whole - inside, part - m) - total)
    return chances


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def padded(index: Tensor, weight: Tensor, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Fills supervised rows (index, weight (M,)) of a micro-batch of `size` up to whole passes of `rows`.

    The rows that fill it are others of the micro-batch, in turn again where there are too few, and weigh 0. If all of
    the micro-batch's rows are needed once, they keep their order. At least one pass is made, so that also a step
    without supervised rows has this shape. On the host.
    """
    total = rows * max(1, -(-len(index) // rows))
    if total == size:
        return torch.arange(size), torch.zeros(size).index_put((index,), weight)
    others = torch.ones(size, dtype=torch.bool).index_fill(0, index, False).nonzero()[:, 0]
    spare = others if len(others) else torch.arange(size)
    missing = total - len(index)
    filling = spare.repeat(-(-missing // len(spare)))[:missing]
    return torch.cat((index, filling)), torch.cat((weight, torch.zeros(missing)))
