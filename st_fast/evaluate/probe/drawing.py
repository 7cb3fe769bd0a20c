"""The figures of a probe as PNG, each with a title and a sentence that says what to see in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from st_fast.evaluate.probe.examine import Findings
from st_fast.evaluate.probe.measures import pca_colours
from st_fast.evaluate.probe.subjects import Subject
from st_fast.report.export import COLOURS, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawn:
    """What is drawn: models, what was found in them, at which times, and the clean images (n, H, W, 3)."""

    subjects: Sequence[Subject]
    found: Sequence[Findings]
    alignments: Sequence[dict[str, Any]]
    times: Sequence[float]
    middle: int
    clean: NDArray[Any]


def draw_all(folder: Path, drawn: Drawn) -> list[dict[str, str]]:
    """Writes every figure; returns file, title and caption of each, in the order in which they tell their story."""
    at = f"t = {drawn.times[drawn.middle]:g}"
    pages = [
        (
            "knows.png", knows(drawn), "What each block knows of the class",
            "Accuracy of a linear classifier on each block's mean-pooled features, on held-out images, the model not "
            "told the class. From little noise (t near 0) to almost nothing but noise (t near 1). Rings mark the block "
            "that extra supervision reads: higher there means that the shallow blocks know earlier.",
        ),
        (
            "patches.png", patches(drawn), f"What the patches look like to each block, {at}",
            "Three principal components of each block's patch features as red, green and blue, for the same noisy "
            "images, which stand left of them. Where strokes and background take different colours, the block "
            "tells them apart through the noise.",
        ),
        (
            "alignment.png", alignment(drawn), f"How alike blocks are, {at}",
            "Linear CKA between the patch features of two blocks: 1 is the same up to rotation and scale. A shallow "
            "block that resembles the deep ones, or its teacher's, has less left to do.",
        ),
        (
            "velocity_loss.png", velocity_loss(drawn), "Held-out denoising loss by time",
            "Mean squared error of the velocity on held-out images with their labels, in bins of t; the same noise for "
            "every model. Lower is better.",
        ),
    ]  # fmt: skip
    for number, subject in enumerate(drawn.subjects):
        pages.append(
            (
                f"patches-{number}.png", patches_by_time(drawn, number), f"Patches by block and time: {subject.label}",
                "As above for one model: a row a time, a column a block.",
            )
        )  # fmt: skip
    for name, figure, _, _ in pages:
        figure.savefig(folder / name, dpi=140)
    return [{"file": name, "title": title, "caption": caption} for name, _, title, caption in pages]


def knows(drawn: Drawn) -> Figure:
    """Linear-probe accuracy by block: a panel a time, a line a model."""
    figure = _canvas(2.6 * len(drawn.times) + 0.6, 3.4)
    panels = figure.subplots(1, len(drawn.times), sharey=True, squeeze=False)[0]
    for place, (axes, t) in enumerate(zip(panels, drawn.times, strict=True)):
        for number, (subject, found) in enumerate(zip(drawn.subjects, drawn.found, strict=True)):
            y, colour = found.accuracy[place], _colour(number)
            axes.plot(found.blocks, y, marker="o", markersize=3.5, color=colour, label=literal(subject.label))
            for tap in subject.supervised:
                axes.plot(tap, y[found.blocks.index(tap)], "o", markersize=11, mfc="none", mec=colour, mew=1.4)
        axes.set_title(f"t = {t:g}", fontsize="medium")
        axes.set_xlabel("block (0: input)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axes)
    panels[0].set_ylabel("linear-probe accuracy")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    panels[-1].legend(frameon=False, fontsize="small")
    return figure


def velocity_loss(drawn: Drawn) -> Figure:
    """Held-out loss by bin of t, a line a model."""
    figure = _canvas(6.4, 3.8)
    axes = figure.subplots()
    for number, (subject, found) in enumerate(zip(drawn.subjects, drawn.found, strict=True)):
        centres = (np.arange(len(found.loss)) + 0.5) / len(found.loss)
        axes.plot(centres, found.loss, marker="o", markersize=4, color=_colour(number), label=literal(subject.label))
    axes.set_xlabel("t (0: data, 1: noise)")
    axes.set_ylabel("held-out denoising loss")
    axes.legend(frameon=False, fontsize="small")
    _tidy(axes)
    return figure


def alignment(drawn: Drawn) -> Figure:
    """CKA between blocks: a panel a model, and one more for each model whose teacher is here too."""
    panels: list[tuple[str, str, str, list[int], list[int], Any]] = []
    for subject, found, values in zip(drawn.subjects, drawn.found, drawn.alignments, strict=True):
        panels.append((subject.label, "block", "block", found.blocks, found.blocks, values["cka"]))
        other = values["with_teacher"]
        if other:
            title = f"{subject.label} and its teacher"
            panels.append(
                (title, "its block", f"block of {other['teacher']}", found.blocks, other["blocks"], other["cka"])
            )
    figure = _canvas(3.3 * len(panels) + 0.6, 3.6)
    lowest = min(value for *_, values in panels for line in values for value in line if value is not None)
    for axes, (title, y, x, rows, columns, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        image = axes.imshow(
            np.array(values, float), vmin=np.floor(10 * lowest) / 10, vmax=1, cmap="viridis", origin="lower"
        )
        axes.set_title(literal(title), fontsize="medium")
        axes.set_xlabel(literal(x))
        axes.set_ylabel(y)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="CKA")
    return figure


def patches(drawn: Drawn) -> Figure:
    """PCA pictures: a row a model, a column a block, at the middle time."""
    rows = [
        (subject.label, found.blocks, found.tokens[drawn.middle])
        for subject, found in zip(drawn.subjects, drawn.found, strict=True)
    ]
    return _pictures(drawn, rows)


def patches_by_time(drawn: Drawn, number: int) -> Figure:
    """PCA pictures of one model: a row a time, a column a block."""
    found = drawn.found[number]
    rows = [(f"t = {t:g}", found.blocks, tokens) for t, tokens in zip(drawn.times, found.tokens, strict=True)]
    return _pictures(drawn, rows)


def _pictures(drawn: Drawn, rows: Sequence[tuple[str, list[int], Any]]) -> Figure:
    columns = max(len(blocks) for _, blocks, _ in rows) + 1
    figure = _canvas(1.15 * columns + 0.9, 1.25 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (line, (name, blocks, tokens)) in enumerate(zip(grid, rows, strict=True)):
        line[0].imshow(_tiled(drawn.clean))
        line[0].set_title("" if number else "images", fontsize="small")
        line[0].text(-0.08, 0.5, literal(name), transform=line[0].transAxes, rotation=90, va="center", ha="right",
                     fontsize="small")  # fmt: skip
        for axes, block, stream in zip(line[1:], blocks, tokens, strict=False):
            side = round(stream.shape[1] ** 0.5)
            axes.imshow(
                _tiled(pca_colours(stream)[: len(drawn.clean)].reshape(-1, side, side, 3)), interpolation="nearest"
            )
            heading = f"block {block}" if block else "input"
            axes.set_title("" if number and blocks == rows[0][1] else heading, fontsize="small")
    return figure


def _tiled(pictures: NDArray[np.floating]) -> NDArray[np.floating]:
    """(n, S, S, 3) → one picture of two columns, white between them."""
    size = pictures.shape[1]
    gap = max(1, size // 8)
    rows = -(-len(pictures) // 2)
    sheet = np.ones((rows * (size + gap) - gap, 2 * size + gap, 3))
    for number, one in enumerate(pictures):
        top, left = number // 2 * (size + gap), number % 2 * (size + gap)
        sheet[top : top + size, left : left + size] = one
    return sheet


def _canvas(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
