"""What a set's normalised latents look like, channel by channel: about mean 0 and std 1, or training fails quietly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from st_fast.data.ahead import RecordSet, mean_and_std
from st_fast.data.buckets import parts_of
from st_fast.data.manifest import Manifest

SAMPLED = 256
"""Records, evenly spaced, that training looks at before it begins."""
MEAN_OF = 65_536
"""Records at most, evenly spaced, of a mean latent: its error is the latents' own spread / 256."""
PART = 1_024
MEAN_MOST, STD_BETWEEN = 0.5, (2 / 3, 1.5)
"""Of all channels together: no warning within. Stable Diffusion's latents of ImageNet have mean 0.3 and std 0.97."""
CHANNEL_MEAN_MOST, CHANNEL_STD_BETWEEN = 0.5, (0.5, 2.0)
"""The same of each channel, for latents that are normalised by channel."""


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of x = scale · (mean + std · ξ), the latents that a network sees, each (C,)."""

    mean: np.ndarray
    std: np.ndarray
    """The whole spread: that of the means, and the posteriors' own."""
    posterior: np.ndarray
    """Root mean square of the posteriors' std."""

    @property
    def whole(self) -> tuple[float, float]:
        """Mean and std of all channels together."""
        mean = float(self.mean.mean())
        return mean, float(np.sqrt((self.std**2 + self.mean**2).mean() - mean**2))

    def warning(self, manifest: Manifest) -> str:
        """One line where they are far from mean 0 and std 1, or ""."""
        mean, std = self.whole
        low, high = STD_BETWEEN
        if abs(mean) > MEAN_MOST or not low <= std <= high:
            return f"the normalised latents have mean {mean:.3g} and std {std:.3g}; training expects about 0 and 1"
        low, high = CHANNEL_STD_BETWEEN
        far = (np.abs(self.mean) > CHANNEL_MEAN_MOST) | (self.std < low) | (self.std > high)
        if manifest.latents_std and far.any():
            worst = int(np.flatnonzero(far)[0])
            return (
                f"the normalised latents of {int(far.sum())} of {len(far)} channels are far from mean 0 and std 1: "
                f"channel {worst} has {self.mean[worst]:.3g} and {self.std[worst]:.3g}; latents_mean and "
                "latents_std in the manifest are of other latents"
            )
        return ""


def latent_statistics(
    records: RecordSet, indices: np.ndarray, progress: Callable[[int], object] = lambda count: None
) -> LatentStatistics:
    """Over these records, read once in parts; sums in float64."""
    made = records.manifest
    total, square, own = np.zeros((3, made.channels))
    parts = (group[start : start + PART] for group in records.by_shape(indices) for start in range(0, len(group), PART))
    for numbers in parts:
        read = records.gather(numbers)[0]
        mean, std = (part.double().numpy() * made.scale for part in mean_and_std(read, made))
        total += mean.mean((2, 3)).sum(0)
        square += (mean**2).mean((2, 3)).sum(0)
        own += (std**2).mean((2, 3)).sum(0)
        progress(len(read))
    average, count = total / len(indices), len(indices)
    spread = np.maximum(square / count - average**2, 0) + own / count
    return LatentStatistics(average, np.sqrt(spread), np.sqrt(own / count))


def sampled_warning(records: RecordSet) -> str:
    """`LatentStatistics.warning` of SAMPLED records."""
    chosen = np.unique(np.linspace(0, len(records) - 1, min(SAMPLED, len(records))).astype(np.int64))
    return latent_statistics(records, chosen).warning(records.manifest)


def shape_name(shape: Sequence[int]) -> str:
    """(C, H, W) as it stands in names: 4x32x32."""
    return "x".join(map(str, shape))


def mean_latents(
    records: RecordSet, progress: Callable[[int], object] = lambda count: None, most: int = MEAN_OF
) -> dict[str, Tensor]:
    """E[x] of the latents that a network sees, (C, H, W) float32, by `shape_name`: one of each shape in the set.

    Over `most` records of a shape, evenly spaced, in their order; sums in float64.
    """
    found = {}
    for part in parts_of(records).values():
        made = part.manifest
        chosen = np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).astype(np.int64))
        total = torch.zeros(made.channels, *made.shape[1:], dtype=torch.float64)
        for start in range(0, len(chosen), PART):
            moments = part.gather(chosen[start : start + PART])[0]
            total += mean_and_std(moments, made)[0].double().sum(0)
            progress(len(moments))
        found[shape_name(total.shape)] = (made.scale / len(chosen) * total).float()
    return found
