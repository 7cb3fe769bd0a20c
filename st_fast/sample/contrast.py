"""The bias that contrastive flow matching trains into v̂, and taking it out while drawing (docs/frontier.md).

‖v̂ − v‖² − λ·‖v̂ − ṽ‖² is least at v̂ = (E[v | x_t, y] − λ·E[ṽ]) / (1 − λ), with E[ṽ] = α'(t)·E[x] as E[ε] = 0. So
E[v | x_t, y] = (1 − λ)·v̂ + λ·α'(t)·E[x]; on the linear path, where α' = −1, (1 − λ)·v̂ − λ·E[x].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.data.statistics import shape_name
from st_fast.model import flow
from st_fast.model.finite import check_finite
from st_fast.recipe.schema import Contrast, Sample


@dataclass(frozen=True)
class Correction:
    """Takes the bias out of v̂ at the times that the settings name."""

    weight: float
    """λ of the stage that trained the weights."""
    null: bool
    """Whether the null branch has the bias, too: samples without a condition took part."""
    how: Literal["unbiased", "released"]
    mean: Tensor
    """(C, H, W) float32: E[x], the mean latent of the data."""
    path: str

    def acts(self, t: float, settings: Sample) -> bool:
        """Whether v̂ is corrected at this time: at all of them, or as released in `cfg_range`."""
        low, high = settings.cfg_range
        return self.how == "unbiased" or low <= t <= high

    def __call__(self, v: Tensor, t: float) -> Tensor:
        """v̂ (B, C, H, W) of one branch at t → E[v | x_t, y]."""
        d_alpha = float(flow.coefficients(torch.tensor(t, dtype=torch.float64), self.path)[2])
        return (1 - self.weight) * v + self.weight * d_alpha * self.mean.to(v.device)


def correction(
    contrast: Contrast, settings: Sample, path: str, means: Mapping[str, Tensor], shape: tuple[int, ...], where: str
) -> Correction | None:
    """What corrects a model of a stage with this contrast while latents of `shape` (C, H, W) are drawn; None: nothing.

    `means`: the mean latents that the checkpoint `where` holds. UserError where that of the shape is not there.
    """
    if contrast.contrast == 0 or settings.contrast == "none":
        return None
    mean, group = means.get(shape_name(shape)), f"{where}: mean_latents"
    if mean is not None and mean.shape != shape:
        raise UserError(f"{group}: {shape_name(shape)} has the shape {tuple(mean.shape)}")
    if mean is None:
        raise UserError(
            f"{where}: trained with contrast = {contrast.contrast:g}, whose bias is taken out by the mean latent, and "
            f"it holds none of {shape_name(shape)}, only of {', '.join(sorted(means)) or 'nothing'}: another size, or "
            '--contrast none (sample.contrast = "none") to draw with the bias'
        )
    check_finite({shape_name(shape): mean}, group)
    return Correction(contrast.contrast, contrast.contrast_null, settings.contrast, mean.float(), path)
