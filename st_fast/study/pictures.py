"""A study's pictures: quality against total FLOPs over all seeds, and samples of one seed at the same cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from st_fast.core.files import inside
from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.collect import Record, number
from st_fast.report.export import COLOURS, few_ticks, literal
from st_fast.report.repeats import Repeats
from st_fast.study.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = (("frechet", "Fréchet distance"), ("accuracy", "accuracy"))


def curves(results: Results) -> Figure:
    """Mean over the seeds against total FLOPs, the range shaded: a row a metric, a column a panel.

    An arm without a panel of its own, such as the baseline, is in every one, and so is the reference.
    """
    from matplotlib.figure import Figure as Canvas

    study = results.study
    panels = [p for p in dict.fromkeys(arm.panel for arm in study.arms) if p] or [""]
    figure = Canvas(figsize=(4.2 * len(panels) + 0.4, 6.6), layout="constrained")
    grid = figure.subplots(len(METRICS), len(panels), sharex=True, sharey="row", squeeze=False)
    for column, panel in enumerate(panels):
        pairs = zip(results.groups, study.arms, strict=True)
        shown = [g for g, arm in pairs if arm.panel in ("", panel) or arm.name == study.reference]
        for row, (metric, label) in enumerate(METRICS):
            axes = grid[row][column]
            for place, group in enumerate(shown):
                x, y = band(group, metric)
                colour = COLOURS[place % len(COLOURS)]
                dash = "--" if place >= len(COLOURS) else "-"
                axes.plot(x, y.mean(axis=0), dash, color=colour, marker="o", markersize=3, label=literal(group.label))
                axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            axes.xaxis.set_major_locator(few_ticks())
            axes.xaxis.set_major_formatter(lambda value, _: words.flops(value))
            axes.tick_params(axis="x", labelsize="small")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
            axes.set_ylabel(label if column == 0 else "")
        grid[-1][column].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        grid[0][column].set_title(literal(panel), loc="left", fontweight="bold")
        grid[0][column].legend(frameon=False, fontsize="small")
        grid[-1][column].set_xlabel("all training FLOPs, teacher included")
    _log_where_wide(grid[0], results)
    return figure


def _log_where_wide(row: Sequence[Axes], results: Results) -> None:
    """Distances that fall to a tenth and less are drawn on a logarithmic axis, with ticks at 1, 2 and 5."""
    from matplotlib import ticker

    values = np.concatenate([band(group, METRICS[0][0])[1].ravel() for group in results.groups])
    if values.min() <= 0 or values.max() < 10 * values.min():
        return
    for axes in row:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: words.plain(value))
        axes.yaxis.set_minor_locator(ticker.NullLocator())


def band(group: Repeats, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Total FLOPs (n,) of an arm's evaluations and the metric (seeds, n); costs are the same for every seed."""
    points = [arm.quality(metric, "flops") for arm in group.by_seed.values()]
    count = min(len(x) for x, _ in points)
    return np.array(points[0][0][:count]), np.array([y[:count] for _, y in points])


def samples(results: Results) -> Figure | None:
    """The first seed's last samples of every arm within the baseline's cost, from the same noise; None without any."""
    from matplotlib.figure import Figure as Canvas
    from PIL import Image

    seed = results.study.seeds[0]
    base = results.group(results.study.baseline).by_seed[seed]
    pictures = []
    for group in results.groups:
        arm = group.by_seed[seed]
        record = _within(arm, base.total.flops)
        if record is not None:
            spent = words.flops(number(record, "flops") + arm.teacher.flops)
            label = f"{group.label}: step {words.count(record['step'])}, {spent} in all"
            pictures.append((label, Image.open(inside(arm.run.path, record["file"]))))
    if not pictures:
        return None
    height = sum(6.0 * image.height / image.width + 0.3 for _, image in pictures)
    figure = Canvas(figsize=(6.2, height + 0.2), layout="constrained")
    column = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for axes, (label, image) in zip(column, pictures, strict=True):
        axes.imshow(image, cmap="gray" if image.mode == "L" else None, interpolation="nearest", aspect="equal")
        axes.set_axis_off()
        axes.set_title(literal(label), loc="left", fontsize=9)
    return figure


def _within(arm: Arm, budget: float) -> Record | None:
    left = budget * (1 + 1e-9) - arm.teacher.flops
    within = [record for record in arm.stage.records["sample"] if number(record, "flops") <= left]
    return within[-1] if within else None
