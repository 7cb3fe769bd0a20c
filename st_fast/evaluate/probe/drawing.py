"""Draws a probe's figures: what the blocks know, how alike they are, and their patches as colours.

No figure has a background, and its ink is a grey that can be read on white and on black, so that the report can show it
in light and in dark mode.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from st_fast.core.files import printable
from st_fast.evaluate.probe.examine import Findings
from st_fast.evaluate.probe.measures import pca_colours
from st_fast.evaluate.probe.subjects import Subject
from st_fast.report import plot
from st_fast.report.figures import Chart, Curve

Models = Sequence[tuple[Subject, Findings]]
GREY = "#7b7f87"
WIDTH, TILE = 1.05, 32
"""Inches of a block's pictures, and pixels of one of them, at least."""


def see_through(canvas: Figure) -> Figure:
    """The figure without its background, its words and axes in GREY."""
    for patch in (canvas.patch, *(axes.patch for axes in canvas.axes)):
        patch.set_visible(False)
    for text in canvas.findobj(Text):
        text.set_color(GREY)
    for axes in canvas.axes:
        axes.tick_params(color=GREY, labelcolor=GREY, grid_color=GREY, grid_alpha=0.25)
        for spine in axes.spines.values():
            spine.set_edgecolor(GREY)
    return canvas


def draw_all(
    folder: Path, models: Models, entries: Sequence[Mapping[str, Any]], times: Sequence[float], middle: int,
    clean: NDArray[Any], classes: Sequence[str],
) -> list[dict[str, str]]:  # fmt: skip
    """Writes every figure, each with a sentence on what to see in it; returns file, title and caption of each.

    `entries`: the models' in probe.json; `clean`: the images (n, H, W, 3), of `classes`;
    `middle`: the place of the time at which one alone is shown.
    """
    at = f"t = {times[middle]:g}"
    rows = [(subject.label, _pictures(subject, one.blocks, one.tokens[middle], clean)) for subject, one in models]
    pages = [
        (
            "knows.png", plot.sheet([accuracy_charts(entries, times)], 2.6, 3.4), "Linear-probe accuracy by block",
            "Accuracy of a linear classifier on each block's mean-pooled features of held-out images, without the "
            "class label, from little noise (t near 0) to almost only noise (t near 1). Rings mark the block that "
            "supervision reads: higher there means that shallow blocks carry the class earlier.",
        ),
        (
            "patches.png", plot.pictures(rows, WIDTH), f"Principal components of the patch features, {at}",
            "Three principal components of each block's patch features as red, green and blue, for the noisy versions "
            "of the images on the left. Where object and background differ in colour, the block tells them apart. The "
            f"images' classes, row by row: {', '.join(map(printable, classes))}.",
        ),
        (
            "alignment.png", _alignment(models, entries), f"Similarity of blocks (CKA), {at}",
            "Linear CKA between the patch features of two blocks: 1 is equal up to rotation and scale. A shallow "
            "block that resembles deep ones, or its teacher's, has less left to do.",
        ),
        (
            "velocity_loss.png", plot.draw(_velocity_loss(models), title=False), "Held-out denoising loss by time",
            "Mean squared error of the velocity on held-out images with their labels, in bins of t, with the same "
            "noise for every model. Lower is better.",
        ),
    ]  # fmt: skip
    for number, (subject, one) in enumerate(models):
        by_time = [(f"t = {t:g}", _pictures(subject, one.blocks, tokens, clean))
                   for t, tokens in zip(times, one.tokens, strict=True)]  # fmt: skip
        title = f"Principal components by block and time: {subject.label}"
        pages.append((f"patches-{number}.png", plot.pictures(by_time, WIDTH), title, "A row a time, a column a block."))
    for name, figure, _, _ in pages:
        plot.save(see_through(figure), folder / name)
    return [{"file": name, "title": title, "caption": caption} for name, _, title, caption in pages]


def accuracy_charts(models: Sequence[Mapping[str, Any]], times: Sequence[float]) -> list[Chart]:
    """Linear-probe accuracy by block, of the entries of probe.json: a chart a time, a curve a model with its errors."""
    charts = []
    for place, t in enumerate(times):
        curves = []
        for number, one in enumerate(models):
            y, error = np.array(one["accuracy"][place]), np.array(one["accuracy_error"][place])
            curves.append(
                Curve(one["label"], [float(block) for block in one["blocks"]], y.tolist(), number,
                      ringed=[one["blocks"].index(tap) for tap in one["supervised_blocks"]],
                      low=(y - error).tolist(), high=(y + error).tolist())
            )  # fmt: skip
        charts.append(
            Chart("", f"t = {t:g}", "", "block (0: input)", "number", "linear-probe accuracy", "percent", False, curves)
        )
    return charts


def _velocity_loss(models: Models) -> Chart:
    """Held-out loss by bin of t, a curve a model."""
    curves = []
    for number, (subject, found) in enumerate(models):
        centres = (np.arange(len(found.loss)) + 0.5) / len(found.loss)
        curves.append(Curve(subject.label, centres.tolist(), found.loss, number))
    label = "t (0: data, 1: noise)"
    return Chart("velocity_loss", "", "", label, "number", "held-out denoising loss", "number", False, curves)


def _alignment(models: Models, entries: Sequence[Mapping[str, Any]]) -> Figure:
    """CKA between blocks: a panel a model, and one more for each model whose teacher is here too."""
    panels: list[tuple[str, str, str, list[int], list[int], Any]] = []
    for (subject, found), entry in zip(models, entries, strict=True):
        values = entry["alignment"]
        panels.append((subject.label, "block", "block", found.blocks, found.blocks, values["cka"]))
        other = values["with_teacher"]
        if other:
            title, x = f"{subject.label} and its teacher", f"block of {other['teacher']}"
            panels.append((title, "its block", x, found.blocks, other["blocks"], other["cka"]))
    return plot.heat_maps(panels, "CKA")


def _pictures(
    subject: Subject, blocks: Sequence[int], tokens: Sequence[NDArray[Any]], clean: NDArray[Any]
) -> list[tuple[str, Any]]:
    """A row of pictures: the clean images, then each block's patches (n, N, D) as colours."""
    row = [("images", _tiled(clean))]
    for block, stream in zip(blocks, tokens, strict=True):
        colours = pca_colours(stream)[: len(clean)].reshape(-1, *subject.model.config.grid, 3)
        row.append((f"block {block}" if block else "input", _tiled(colours)))
    return row


def _tiled(pictures: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(n, H, W, 3) in 0..1 → one uint8 picture (H', W', 4) in two columns, nothing around and between them.

    Small ones are enlarged, so that the gap is a thin one.
    """
    factor = math.ceil(TILE / pictures.shape[1])
    large = (255 * pictures).round().astype(np.uint8).repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = large.shape
    gap = height // 16
    sheet = np.zeros((math.ceil(count / 2) * (height + gap) - gap, 2 * width + gap, 4), np.uint8)
    for number, picture in enumerate(large):
        top, left = (height + gap) * (number // 2), (width + gap) * (number % 2)
        sheet[top : top + height, left : left + width] = np.dstack((picture, np.full((height, width), 255, np.uint8)))
    return sheet
