"""The distribution of training's times, and the shift of these and of samplers' times towards noise. No torch.

Where data fill more numbers, the same t leaves more of them to see: a latent of n times as many needs the noise level
√n times as large to show as little (arXiv 2403.03206, section 5.3.2).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from st_fast.recipe.keys import Shift
from st_fast.recipe.schema import Flow, Sample

S = TypeVar("S", Flow, Sample)
UNSHIFTED = 4 * 32 * 32
"""Numbers in a latent of 256 × 256 pixels by SD's VAE, for which no shift is usual."""


def with_shift(settings: S, shape: Sequence[int]) -> S:
    """[flow] or [sample] with the number that its shift is for latents (C, H, W): "auto" is √(C·H·W / 4096)."""
    shift = math.sqrt(math.prod(shape) / UNSHIFTED) if settings.shift == "auto" else settings.shift
    return replace(settings, shift=shift)


def shifted(t: Any, shift: Shift, power: int = 1) -> Any:
    """t' = s·t / (1 + (s − 1)·t), of a number or a tensor (arXiv 2403.03206, equation 23); power −1 shifts back.

    ValueError for "auto", which is no number before `with_shift`.
    """
    if isinstance(shift, str):
        raise ValueError(f"shift = {shift!r}: a number is needed")
    s = shift**power
    return s * t / (s * t + (1 - t))  # the same, and exactly t for s = 1, and 1 for t = 1


def time_cdf(flow: Flow, t: float) -> float:
    """P(time ≤ t) as training draws its times; the shift is a number."""
    t = shifted(t, flow.shift, power=-1)
    if flow.time in ("uniform", "stratified") or not 0 < t < 1:
        return t
    if flow.time == "logit_normal":
        deviations = (math.log(t / (1 - t)) - flow.time_mean) / flow.time_std
    else:
        deviations = math.log(t / (1 - t) if flow.path == "linear" else math.tan(t * math.pi / 2))
    return 0.5 * (1 + math.erf(deviations / math.sqrt(2)))
