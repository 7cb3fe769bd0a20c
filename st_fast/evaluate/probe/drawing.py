"""The figures of a probe as PNG, each with a title and a sentence that says what to see in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from st_fast.evaluate.probe.examine import Findings
from st_fast.evaluate.probe.measures import pca_colours
from st_fast.model import SiT
from st_fast.recipe.schema import Stage
from st_fast.report import plot
from st_fast.report.figures import Chart, Curve


@dataclass(frozen=True)
class Subject:
    """One frozen model: its label in the figures, its stage, and its teacher's label where that one is probed too."""

    label: str
    stage: Stage
    model: SiT
    teacher: str | None

    @property
    def supervised(self) -> tuple[int, ...]:
        """The blocks that extra supervision reads; none in plain training."""
        tap: int | tuple[int, ...] = self.stage.method.tap
        return tuple(block for block in (tap if isinstance(tap, tuple) else (tap,)) if block)


@dataclass(frozen=True)
class Drawn:
    """Models, what was found in them at which times, and the clean images (n, H, W, 3)."""

    subjects: Sequence[Subject]
    found: Sequence[Findings]
    alignments: Sequence[dict[str, Any]]
    times: Sequence[float]
    middle: int
    clean: NDArray[Any]


def draw_all(folder: Path, drawn: Drawn) -> list[dict[str, str]]:
    """Writes every figure; returns file, title and caption of each."""
    at, found = f"t = {drawn.times[drawn.middle]:g}", drawn.found
    models = [(s.label, _pictures(f.blocks, f.tokens[drawn.middle], drawn.clean))
              for s, f in zip(drawn.subjects, found, strict=True)]  # fmt: skip
    pages = [
        (
            "knows.png", plot.sheet([_accuracy(drawn)], 2.6, 3.4), "Linear-probe accuracy by block",
            "Accuracy of a linear classifier on each block's mean-pooled features of held-out images, without the "
            "class label, from little noise (t near 0) to almost only noise (t near 1). Rings mark the block that "
            "supervision reads: higher there means that shallow blocks carry the class earlier.",
        ),
        (
            "patches.png", plot.pictures(models, 1.05), f"Principal components of the patch features, {at}",
            "Three principal components of each block's patch features as red, green and blue, for the noisy versions "
            "of the images on the left. Where strokes and background differ in colour, the block tells them apart.",
        ),
        (
            "alignment.png", _alignment(drawn), f"Similarity of blocks (CKA), {at}",
            "Linear CKA between the patch features of two blocks: 1 is equal up to rotation and scale. A shallow "
            "block that resembles deep ones, or its teacher's, has less left to do.",
        ),
        (
            "velocity_loss.png", plot.draw(_velocity_loss(drawn), title=False), "Held-out denoising loss by time",
            "Mean squared error of the velocity on held-out images with their labels, in bins of t, with the same "
            "noise for every model. Lower is better.",
        ),
    ]  # fmt: skip
    for number, (subject, one) in enumerate(zip(drawn.subjects, found, strict=True)):
        by_time = [(f"t = {t:g}", _pictures(one.blocks, tokens, drawn.clean))
                   for t, tokens in zip(drawn.times, one.tokens, strict=True)]  # fmt: skip
        title = f"Principal components by block and time: {subject.label}"
        pages.append((f"patches-{number}.png", plot.pictures(by_time, 1.05), title, "A row a time, a column a block."))
    for name, figure, _, _ in pages:
        plot.save(figure, folder / name)
    return [{"file": name, "title": title, "caption": caption} for name, _, title, caption in pages]


def _accuracy(drawn: Drawn) -> list[Chart]:
    """Linear-probe accuracy by block: a chart a time, a curve a model, the supervised blocks ringed."""
    charts = []
    for place, t in enumerate(drawn.times):
        curves = [
            Curve(s.label, [float(block) for block in f.blocks], f.accuracy[place], number,
                  ringed=[f.blocks.index(tap) for tap in s.supervised])
            for number, (s, f) in enumerate(zip(drawn.subjects, drawn.found, strict=True))
        ]  # fmt: skip
        charts.append(
            Chart("", f"t = {t:g}", "", "block (0: input)", "number", "linear-probe accuracy", "percent", False, curves)
        )
    return charts


def _velocity_loss(drawn: Drawn) -> Chart:
    """Held-out loss by bin of t, a curve a model."""
    curves = []
    for number, (subject, found) in enumerate(zip(drawn.subjects, drawn.found, strict=True)):
        centres = (np.arange(len(found.loss)) + 0.5) / len(found.loss)
        curves.append(Curve(subject.label, centres.tolist(), found.loss, number))
    label = "t (0: data, 1: noise)"
    return Chart("velocity_loss", "", "", label, "number", "held-out denoising loss", "number", False, curves)


def _alignment(drawn: Drawn) -> Figure:
    """CKA between blocks: a panel a model, and one more for each model whose teacher is here too."""
    panels: list[tuple[str, str, str, list[int], list[int], Any]] = []
    for subject, found, values in zip(drawn.subjects, drawn.found, drawn.alignments, strict=True):
        panels.append((subject.label, "block", "block", found.blocks, found.blocks, values["cka"]))
        other = values["with_teacher"]
        if other:
            title, x = f"{subject.label} and its teacher", f"block of {other['teacher']}"
            panels.append((title, "its block", x, found.blocks, other["blocks"], other["cka"]))
    return plot.heat_maps(panels, "CKA")


def _pictures(blocks: Sequence[int], tokens: Sequence[NDArray[Any]], clean: NDArray[Any]) -> list[tuple[str, Any]]:
    """A row of pictures: the clean images, then each block's patches (n, N, D) as colours."""
    row = [("images", _tiled(clean))]
    for block, stream in zip(blocks, tokens, strict=True):
        side = round(stream.shape[1] ** 0.5)
        colours = pca_colours(stream)[: len(clean)].reshape(-1, side, side, 3)
        row.append((f"block {block}" if block else "input", _tiled(colours)))
    return row


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
