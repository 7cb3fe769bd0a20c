"""Statistics of a set of latents, as text."""

import numpy as np

from st_fast.core.progress import bar
from st_fast.data.ahead import RecordSet


def describe(records: RecordSet) -> str:
    """Per-channel statistics of the sampled latents mean + std · ξ, unscaled, and the number of records a class.

    Reads every record once; sums in float64. "std" is the total, the spread of the means plus the posterior's own; "of
    which posterior" the root mean square of the posterior's std.
    """
    manifest, count = records.manifest, len(records)
    total, square, own = np.zeros((3, manifest.channels))
    with bar(None, "reading", count, "records") as progress:
        for start in range(0, count, 1024):
            moments = records.gather(np.arange(start, min(start + 1024, count)))[0].numpy().astype(np.float64)
            mean, std = np.split(moments, 2, axis=1)
            total += mean.mean((2, 3)).sum(0)
            square += (mean**2).mean((2, 3)).sum(0)
            own += (std**2).mean((2, 3)).sum(0)
            progress.update(len(moments))
    average = total / count
    deviation = np.sqrt(square / count - average**2 + own / count)
    overall = np.sqrt((deviation**2 + average**2).mean() - average.mean() ** 2)  # over all channels together
    classes = np.bincount(records.labels, minlength=manifest.num_classes)
    lines = [f"{count:,} records, {int((classes > 0).sum())} of {len(classes)} classes present"]
    lines += ["channel      mean       std  of which posterior"]
    for number, row in enumerate(zip(average, deviation, np.sqrt(own / count), strict=True)):
        lines.append(f"{number:7d}  {row[0]:8.4f}  {row[1]:8.4f}  {row[2]:8.4f}")
    lines.append(f"    all  std {overall:.4f}; 1/std = {1 / overall:.5f} would give unit variance")
    if len(classes) <= 20:
        labels = manifest.class_names or tuple(map(str, range(len(classes))))
        lines.append("classes: " + ", ".join(f"{n} {c}" for n, c in zip(labels, classes.tolist(), strict=True)))
    else:
        low, middle, high = np.percentile(classes, (0, 50, 100))
        lines.append(f"records a class: {low:.0f} at least, {middle:.0f} in the middle, {high:.0f} at most")
    return "\n".join(lines)
