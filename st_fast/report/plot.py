"""Draws every figure with matplotlib: SVG whose colours follow the page's style sheet, and PNG files."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, MultipleLocator, NullLocator

from st_fast.core.files import make_folder, write_atomic, write_json_atomic
from st_fast.core.writing import cannot_write
from st_fast.report.figures import Bars, Chart, Curve, Figure
from st_fast.report.words import UNITS

COLOURS = ("#2a62c9", "#cf4f1b", "#0f8463", "#7d45c4", "#9a7200", "#b52d6f")
SEGMENTS = ("#2a62c9", "#8fb2f0", "#e0a458")
INK, SOFT, GRID = "#1d1f23", "#5c616b", "#ece9e3"
VARIABLES = {
    **{colour: f"--s{n}" for n, colour in enumerate(SEGMENTS)},
    **{colour: f"--c{n}" for n, colour in enumerate(COLOURS)},
    INK: "--ink", SOFT: "--soft", GRID: "--grid",
}  # fmt: skip
"""The style sheet's name of each colour, which differs in dark mode."""
NICE = [n * 10**power for power in range(-12, 20) for n in (1, 2, 5)]
DASHES = ("-", "--", ":")
MAX_POINTS = 300
WIDTH = 4.0
"""Of a figure, in inches; an entry of its legend takes about 48 points and 6 a letter."""
LEGEND, LINE = 42, 40
"""Characters that fit into a legend's line, and into one over a bar, its total included."""
STYLE = {
    "text.parse_math": False, "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT,
    "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": GRID, "font.size": 10, "legend.frameon": False, "legend.fontsize": 9,
    "legend.handlelength": 2.8, "axes.titlelocation": "left", "axes.titlesize": 11, "svg.fonttype": "none",
}  # fmt: skip


def svg(figure: Figure) -> Markup:
    """The figure without its title as an <svg> element; the page's style sheet says colours and font."""
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": figure.key}):
        canvas = draw(figure, title=False)
        for patch in (canvas.patch, *(axes.patch for axes in canvas.axes)):
            patch.set_visible(False)  # the page shows through
        FigureCanvasSVG(canvas).print_svg(buffer)  # savefig would draw it twice
    text = re.sub(r"<(metadata|style).*?</\1>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    start = Markup('<svg role="img" aria-label="{}" ').format(figure.title)
    return Markup(text.replace("<svg ", start, 1))


def export(figures: Sequence[Figure], folder: Path) -> None:
    """Writes `<key>.png` and, with every point, `<key>.json` for each figure; UserError where that fails."""
    try:
        make_folder(folder)
        for figure in figures:
            save(draw(figure), folder / f"{figure.key}.png", dpi=250)
            write_json_atomic(folder / f"{figure.key}.json", {"kind": type(figure).__name__.lower(), **asdict(figure)})
    except OSError as error:
        raise cannot_write(folder, error) from None


def save(canvas: Canvas, path: Path, dpi: int = 140) -> None:
    """Writes a PNG."""
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    write_atomic(path, file.getvalue())


def draw(figure: Figure, title: bool = True) -> Canvas:
    """One chart, or one set of bars, with its legend below."""
    with rc_context(STYLE):
        labels = [c.label for c in figure.curves] if isinstance(figure, Chart) else list(figure.segments)
        columns = max(1, min(len(labels), int(WIDTH * 72 // (48 + 6 * max(len(_short(label)) for label in labels)))))
        legend = 0.2 * math.ceil(len(labels) / columns)
        height = 2.7 if isinstance(figure, Chart) else 0.6 + 0.5 * len(figure.rows)
        canvas = Canvas(figsize=(WIDTH, height + legend + 0.25 * title), layout="constrained")
        axes = canvas.subplots()
        if isinstance(figure, Chart):
            chart(axes, figure)
        else:
            bars(axes, figure)
        if title:
            axes.set_title(figure.title, fontweight="bold")
        canvas.legend(loc="outside lower left", ncols=columns)
        return canvas


def sheet(charts: Sequence[Sequence[Chart]], width: float, height: float, common: bool = True) -> Canvas:
    """Charts in rows and columns, by default of `common` axes; one legend below where all have the same curves.

    Without common axes each has its own title and legend, and the last row may be shorter.
    """
    with rc_context(STYLE):
        rows, columns = len(charts), len(charts[0])
        canvas = Canvas(figsize=(width * columns + 0.4, height * rows), layout="constrained")
        grid = canvas.subplots(rows, columns, sharex=common, sharey="row" if common else False, squeeze=False)
        for line, drawn in zip(grid, charts, strict=True):
            for axes in line[len(drawn) :]:
                axes.set_visible(False)
            for axes, one in zip(line, drawn, strict=False):
                chart(axes, one, drawn if common else ())
                if common:
                    axes.label_outer()
                axes.tick_params(axis="x", labelsize="small")
        canvas.align_ylabels()
        labels = [[curve.label for curve in one.curves] for one in charts[0]]
        titled = [*zip(grid, charts, strict=True)][: 1 if common else None]
        for line, drawn in titled:
            for axes, one in zip(line, drawn, strict=False):
                axes.set_title(one.title, fontweight="bold")
        if all(names == labels[0] for names in labels):
            entries = max(1, min(len(labels[0]), int(72 * width * columns // (48 + 6 * max(map(len, labels[0]))))))
            canvas.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=entries)
        else:
            for line, drawn in titled:
                for axes, _ in zip(line, drawn, strict=False):
                    axes.legend(fontsize="small")
        return canvas


def chart(axes: Axes, figure: Chart, row: Sequence[Chart] = ()) -> None:
    """Curves with their axes, units and levels; no title and no legend. `row`: charts that share its y axis."""
    for curve in figure.curves:
        _curve(axes, curve)
    shown = row or [figure]
    values = [y for one in shown for curve in one.curves for y in (*curve.y, *curve.low, *curve.high)]
    values += [level.y for one in shown for level in one.levels]
    low, high = min(values), max(values)
    if figure.log_y and low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(_log_ticks(low, high))
        air = max(0.05 * math.log10(high / low), 0.02)
        axes.set_ylim(low / 10**air, high * 10**air)
    else:
        bottom, top = min(0.0, low), 1.0 if figure.y_unit == "percent" and 0.5 < high <= 1 else high
        axes.yaxis.set_major_locator(_ticks())
        axes.set_ylim(bottom, top + 0.06 * (top - bottom) if top > bottom else bottom + 1.0)
    for level in figure.levels:
        axes.axhline(level.y, color=SOFT, linestyle=(0, (2, 3)), linewidth=1)
        below = axes.transLimits.transform(axes.transScale.transform((0, level.y)))[1] > 0.9
        axes.annotate(
            f"{level.label}: {UNITS[figure.y_unit](level.y)}", (0, level.y), (4, -12 if below else 3), fontsize=9,
            color=SOFT, xycoords=axes.get_yaxis_transform(), textcoords="offset points",
        )  # fmt: skip
    axes.yaxis.set_major_formatter(FuncFormatter(_tick_text(figure.y_unit)))
    if figure.x_unit != "number":
        axes.set_xlim(left=0)
    _x_axis(axes.xaxis, figure.x_unit, max(x for curve in figure.curves for x in curve.x))
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)


def _curve(axes: Axes, curve: Curve) -> None:
    colour, dash = COLOURS[curve.colour % len(COLOURS)], DASHES[curve.dash % len(DASHES)]
    x, y, label = curve.x, curve.y, _short(curve.label)
    if not curve.marked:
        x, raw = thinned(curve.x, curve.y)
        axes.plot(x, raw, color=colour, alpha=0.28, linewidth=0.8)
        y = smoothed(raw)
    axes.plot(x, y, dash, color=colour, marker="o" if curve.marked else "", markersize=4, linewidth=1.8, label=label)
    if curve.low:
        axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    ringed = [x[n] for n in curve.ringed], [y[n] for n in curve.ringed]
    axes.plot(*ringed, "o", markersize=10, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.4)


def _short(label: str, most: int = LEGEND) -> str:
    """A label that fits: of a longer one the start and the end, which tell a run's stages and seeds apart."""
    end = most * 2 // 5
    return label if len(label) <= most else f"{label[: most - end - 1]}…{label[-end:]}"


def _x_axis(axis: Axis, unit: str, high: float) -> None:
    axis.set_major_formatter(FuncFormatter(_tick_text(unit)))
    axis.set_major_locator(_ticks())
    if unit == "number":
        axis.set_major_locator(MaxNLocator(nbins=6, integer=high > 1.5))
    if unit == "seconds":  # round in the largest unit of which there are two
        size, name = next(((s, n) for s, n in ((86_400, "d"), (3_600, "h"), (60, "min")) if high >= 2 * s), (1, "s"))
        axis.set_major_locator(MultipleLocator(size * next(n for n in NICE if (high or 1) <= 5 * n * size)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:.4g} {name}"))


def _ticks() -> MaxNLocator:
    """At most five round ticks, so that values with units have room."""
    return MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])


def _log_ticks(low: float, high: float) -> Locator:
    """A few ticks of a logarithmic axis, however many decades it has."""
    decades = math.log10(high / low)
    if decades < 0.8:
        return _ticks()
    return LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,), numticks=7)


def _tick_text(unit: str) -> Callable[[float, Any], str]:
    """Ticks are shorter than values in a sentence: no decimals on percentages, k and M on steps."""
    if unit == "percent":
        return lambda value, _: f"{100 * value:.3g} %"
    if unit == "steps":
        return lambda n, _: f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k" if n >= 1e4 else f"{n:g}"
    return lambda value, _: UNITS[unit](value) if value else "0"


def bars(axes: Axes, figure: Bars) -> None:
    """A row an arm: its label and its sum over its bar."""
    places, write = range(len(figure.rows)), UNITS[figure.unit]
    totals = [("" if row.known else "at least ") + write(math.fsum(row.sizes)) for row in figure.rows]
    most = LINE - max(map(len, totals))
    for n, name in enumerate(figure.segments):
        left = [math.fsum(row.sizes[:n]) for row in figure.rows]
        colour = SEGMENTS[-1 if n == len(figure.segments) - 1 else n]
        axes.barh(places, [row.sizes[n] for row in figure.rows], 0.4, left, color=colour, label=name)
    for place, (row, total) in enumerate(zip(figure.rows, totals, strict=True)):
        axes.annotate(_short(row.label, most), (0, place - 0.27), va="bottom")
        axes.annotate(total, (1, place - 0.27), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set_ylim(len(figure.rows) - 0.7, -0.75)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    _x_axis(axes.xaxis, figure.unit, max(math.fsum(row.sizes) for row in figure.rows))


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal stretches of a longer series."""
    size = math.ceil(len(x) / MAX_POINTS)
    starts = range(0, len(x), size)
    return [x[min(s + size, len(x)) - 1] for s in starts], [float(np.mean(y[s : s + size])) for s in starts]


def smoothed(y: Sequence[float]) -> list[float]:
    """A centred moving mean over about a twentieth of the series, shrinking towards both ends."""
    place, sums = np.arange(len(y)), np.cumsum([0.0, *y])
    reach = np.minimum(np.minimum(place, place[::-1]), len(y) // 40)
    mean: list[float] = ((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)).tolist()
    return mean


def heat_maps(panels: Sequence[tuple[str, str, str, Sequence[int], Sequence[int], Any]], label: str) -> Canvas:
    """Panels (title, label of rows, label of columns, names of rows, names of columns, values up to 1)."""
    with rc_context(STYLE | {"axes.grid": False}):
        canvas = Canvas(figsize=(3.3 * len(panels) + 0.6, 3.6), layout="constrained")
        arrays = [np.array(values, float) for *_, values in panels]
        lowest = np.floor(10 * min(np.nanmin(values) for values in arrays)) / 10
        grid = canvas.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, y, x, rows, columns, _), values in zip(grid, panels, arrays, strict=True):
            image = axes.imshow(values, vmin=lowest, vmax=1, cmap="viridis", origin="lower")
            axes.set(title=title, xlabel=x, ylabel=y)
            axes.set_xticks(range(len(columns)), [str(name) for name in columns])
            axes.set_yticks(range(len(rows)), [str(name) for name in rows])
        canvas.colorbar(image, ax=canvas.axes, shrink=0.8, label=label)
        return canvas


def pictures(rows: Sequence[tuple[str, Sequence[tuple[str, Any]]]], width: float) -> Canvas:
    """Rows of pictures, each `width` inches wide, (its row's label, [(title, image (H, W) or (H, W, 3)), …])."""
    with rc_context(STYLE | {"axes.titlesize": 9}):
        columns = max(len(line) for _, line in rows)
        heights = [max(width * image.shape[0] / image.shape[1] for _, image in line) + 0.2 for _, line in rows]
        named = 0.3 * any(label for label, _ in rows)
        canvas = Canvas(figsize=((width + 0.1) * columns + named, sum(heights) + 0.2), layout="constrained")
        grid = canvas.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for axes in grid.flat:
            axes.set_axis_off()
        for line, (label, images) in zip(grid, rows, strict=True):
            line[0].text(
                -0.08, 0.5, label, transform=line[0].transAxes, rotation=90, va="center", ha="right", fontsize=9
            )
            for axes, (title, image) in zip(line, images, strict=False):
                axes.imshow(image, cmap="gray" if image.ndim == 2 else None, interpolation="nearest")
                axes.set_title(title)
        return canvas
