"""What is in a set of latents, in figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from st_fast.core.progress import bar
from st_fast.data.ahead import RecordSet


@dataclass(frozen=True)
class Stats:
    """Per-channel statistics of the sampled latents mean + std · ξ, unscaled, and how many records a class has."""

    count: int
    mean: np.ndarray
    """(C,) float64."""
    std: np.ndarray
    """(C,) float64: the total, spread of the means plus the posterior's own."""
    posterior_std: np.ndarray
    """(C,) float64: root mean square of the posterior's std."""
    classes: np.ndarray
    """(num_classes,) records a class."""

    @property
    def overall_std(self) -> float:
        """Standard deviation over all channels together; its inverse is the scale that gives unit variance."""
        variance = (self.std**2 + self.mean**2).mean() - self.mean.mean() ** 2
        return float(np.sqrt(variance))


def statistics(records: RecordSet) -> Stats:
    """Reads every record once; sums in float64."""
    count, channels = records.manifest.count, records.manifest.channels
    total, square, own = np.zeros((3, channels))
    with bar(None, "reading", count, "records") as progress:
        for start in range(0, count, 1024):
            moments = records.gather(np.arange(start, min(start + 1024, count)))[0].numpy().astype(np.float64)
            mean, std = np.split(moments, 2, axis=1)
            total += mean.mean((2, 3)).sum(0)
            square += (mean**2).mean((2, 3)).sum(0)
            own += (std**2).mean((2, 3)).sum(0)
            progress.update(len(moments))
    average = total / count
    variance = square / count - average**2
    classes = np.bincount(records.labels, minlength=records.manifest.num_classes)
    return Stats(count, average, np.sqrt(variance + own / count), np.sqrt(own / count), classes)


def describe(stats: Stats, names: tuple[str, ...]) -> str:
    """The statistics as text."""
    lines = [f"{stats.count:,} records, {int((stats.classes > 0).sum())} of {len(stats.classes)} classes present"]
    lines += ["channel      mean       std  of which posterior"]
    for number, row in enumerate(zip(stats.mean, stats.std, stats.posterior_std, strict=True)):
        lines.append(f"{number:7d}  {row[0]:8.4f}  {row[1]:8.4f}  {row[2]:8.4f}")
    lines.append(f"    all  std {stats.overall_std:.4f}; 1/std = {1 / stats.overall_std:.5f} would give unit variance")
    if len(stats.classes) <= 20:
        labels = names or tuple(map(str, range(len(stats.classes))))
        lines.append("classes: " + ", ".join(f"{n} {c}" for n, c in zip(labels, stats.classes.tolist(), strict=True)))
    else:
        low, middle, high = np.percentile(stats.classes, (0, 50, 100))
        lines.append(f"records a class: {low:.0f} at least, {middle:.0f} in the middle, {high:.0f} at most")
    return "\n".join(lines)
