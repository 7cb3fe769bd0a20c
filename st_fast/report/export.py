"""Writes each figure as PNG, for slides and papers, and as JSON with every point, for anything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, write_json_atomic
from st_fast.report.figures import Bars, Chart, Figure
from st_fast.report.svg import smoothed, thinned
from st_fast.report.words import UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

COLOURS = ("#2a62c9", "#cf4f1b", "#0f8463", "#7d45c4", "#9a7200", "#b52d6f")
SEGMENTS = ("#2a62c9", "#8fb2f0", "#e0a458")
DASHES = ("-", "--", ":")


def export(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Writes `<key>.png` and `<key>.json` for each figure into `folder`; UserError without matplotlib or space."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise UserError("--export draws with matplotlib, which is not installed: pip install matplotlib") from None
    written = []
    try:
        make_folder(folder)
        for figure in figures:
            canvas = Canvas(figsize=(6.4, 4.0), layout="constrained")
            axes = canvas.add_subplot()
            axes.set_title(literal(figure.title), loc="left", fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            if isinstance(figure, Chart):
                _chart(axes, figure)
            else:
                _bars(axes, figure)
            png, data = folder / f"{figure.key}.png", folder / f"{figure.key}.json"
            canvas.savefig(png, dpi=160)
            write_json_atomic(data, {"kind": type(figure).__name__.lower(), **asdict(figure)})
            written += [png, data]
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from None
    return written


def _chart(axes: Axes, figure: Chart) -> None:
    for curve in figure.curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        if curve.marked:
            x, y, marker = curve.x, curve.y, "o"
        else:
            x, raw = thinned(curve.x, curve.y)
            axes.plot(x, raw, color=colour, alpha=0.25, linewidth=0.8)
            y, marker = smoothed(raw), ""
        dash = DASHES[curve.dash % len(DASHES)]
        axes.plot(x, y, dash, color=colour, marker=marker, markersize=4, linewidth=1.8, label=literal(curve.label))
    for level in figure.levels:
        axes.axhline(level.y, color="#888888", linestyle=(0, (2, 3)), linewidth=1, label=literal(level.label))
    if figure.log_y:
        axes.set_yscale("log")
    elif figure.y_unit == "percent":
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: UNITS[figure.x_unit](value))
    axes.xaxis.set_major_locator(few_ticks())
    axes.yaxis.set_major_formatter(lambda value, _: UNITS[figure.y_unit](value))
    axes.set_xlabel(figure.x_label)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize="small")


def few_ticks() -> MaxNLocator:
    """At most five round ticks, so that values with units have room."""
    from matplotlib import ticker

    return ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def _bars(axes: Axes, figure: Bars) -> None:
    rows = figure.rows[::-1]
    for n, name in enumerate(figure.segments):
        left = [math.fsum(row.sizes[:n]) for row in rows]
        colour = SEGMENTS[-1 if n == len(figure.segments) - 1 else n]
        axes.barh(range(len(rows)), [row.sizes[n] for row in rows], left=left, color=colour, label=literal(name))
    axes.set_yticks(range(len(rows)), [literal(row.label) for row in rows])
    axes.xaxis.set_major_formatter(lambda value, _: UNITS[figure.unit](value))
    axes.xaxis.set_major_locator(few_ticks())
    axes.legend(frameon=False, fontsize="small")


def literal(text: str) -> str:
    """Text that matplotlib doesn't read as mathematics."""
    return text.replace("$", r"\$")
