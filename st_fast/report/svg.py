"""Draws figures as inline SVG whose colours and fonts come from the page's style sheet, so dark mode works."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from st_fast.report.figures import Chart, Curve
from st_fast.report.words import UNITS

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 42
MAX_POINTS = 300
COLOURS = 6
DASHES = ("", "6 4", "2 3")


@dataclass(frozen=True)
class Axis:
    """Maps values of [low, high], linear or logarithmic, onto pixels of [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        return self.start + (self._scaled(value) - self._scaled(self.low)) / self._span * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    @property
    def _span(self) -> float:
        return self._scaled(self.high) - self._scaled(self.low) or 1.0

    def ticks(self) -> list[float]:
        """About five round values inside."""
        if self.log and self._span >= 0.8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(ticks) <= 6:
                    return ticks
            return ticks[:: math.ceil(len(ticks) / 6)]
        return _round_ticks(self.low, self.high)


def _round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def chart(figure: Chart) -> Markup:
    """One chart as an <svg> element; its legend is the page's."""
    xs = [x for curve in figure.curves for x in curve.x]
    x_axis = Axis(min(0.0, *xs), max(xs) or 1.0, LEFT, WIDTH - RIGHT, log=False)
    y_axis = _y_axis(figure)
    parts = [*_grid(figure, x_axis, y_axis)]
    for level in figure.levels:
        y = y_axis(level.y)
        parts.append(_line("level", x_axis.start, y, x_axis.end, y))
        above = y - 5 if y > TOP + 16 else y + 14
        parts.append(_text("tick", x_axis.start + 5, above, f"{level.label}: {UNITS[figure.y_unit](level.y)}", "start"))
    for curve in figure.curves:
        parts.extend(_curve(curve, figure, x_axis, y_axis))
    return _svg(HEIGHT, f"{figure.title}: {', '.join(curve.label for curve in figure.curves)}", parts)


def _y_axis(figure: Chart) -> Axis:
    """From the lowest to the highest value shown, with air; percentages start at 0 and end at 100 or, if small, ≥ 5."""
    values = [y for curve in figure.curves for y in curve.y] + [level.y for level in figure.levels]
    low, high = min(values), max(values)
    if figure.log_y and low > 0:
        air = max(0.06 * math.log10(high / low), 0.02)
        return Axis(low / 10**air, high * 10**air, HEIGHT - BOTTOM, TOP, log=True)
    if figure.y_unit == "percent":
        top = 1.0 if high > 0.5 else max(1.15 * high, 0.05)
        return Axis(min(0.0, low), max(top, high), HEIGHT - BOTTOM, TOP, log=False)
    low = min(0.0, low) if low >= 0 else low - 0.06 * (high - low)
    return Axis(low, high + 0.08 * (high - low) or 1.0, HEIGHT - BOTTOM, TOP, log=False)


def _grid(figure: Chart, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    scale, x_text = _x_scale(figure.x_unit, x_axis.high)
    y_text = _tick_text(figure.y_unit)
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(_line("grid", x_axis.start, y, x_axis.end, y))
        parts.append(_text("tick", x_axis.start - 7, y + 4, y_text(tick), "end"))
    for tick in (scale * tick for tick in _round_ticks(x_axis.low / scale, x_axis.high / scale, most=4)):
        anchor = "end" if x_axis(tick) > WIDTH - RIGHT - 22 else "middle"
        parts.append(_text("tick", x_axis(tick), y_axis.start + 17, x_text(tick) if tick else "0", anchor))
    parts.append(_line("axis", x_axis.start, y_axis.start, x_axis.end, y_axis.start))
    parts.append(_text("axis-label", (x_axis.start + x_axis.end) / 2, HEIGHT - 7, figure.x_label, "middle"))
    return parts


def _x_scale(unit: str, high: float) -> tuple[float, Callable[[float], str]]:
    """The size of the unit that ticks are round in (a minute, an hour), and how a tick is written."""
    if unit == "seconds":
        sizes = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))
        size, name = next((pair for pair in sizes if high >= 2 * pair[0]), sizes[-1])
        return size, lambda value: f"{value / size:.4g} {name}"
    return 1.0, _tick_text(unit)


def _tick_text(unit: str) -> Callable[[float], str]:
    """Tick labels are shorter than values in a sentence: no decimals on percentages, k and M on steps."""
    if unit == "percent":
        return lambda value: f"{100 * value:.3g} %"
    if unit == "steps":
        return lambda step: f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"
    return UNITS[unit]


def _curve(curve: Curve, figure: Chart, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    colour, dash = f"c{curve.colour % COLOURS}", DASHES[curve.dash % len(DASHES)]
    if not curve.marked:
        x, y = thinned(curve.x, curve.y)
        parts = [_path(f"raw {colour}", x, y, x_axis, y_axis, "")] if len(x) > 8 else []
        return [*parts, _path(f"curve {colour}", x, smoothed(y), x_axis, y_axis, dash)]
    parts = [_path(f"curve {colour}", curve.x, curve.y, x_axis, y_axis, dash)]
    for x_value, y_value in zip(curve.x, curve.y, strict=True):
        words = f"{curve.label}: {UNITS[figure.y_unit](y_value)} at {UNITS[figure.x_unit](x_value)}"
        if figure.x_unit == "steps":
            words += " steps"
        parts.append(
            Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.4"><title>{}</title></circle>').format(
                colour, _px(x_axis(x_value)), _px(y_axis(y_value)), words
            )
        )
    return parts


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal stretches of a longer series."""
    size = math.ceil(len(x) / MAX_POINTS)
    starts = range(0, len(x), size)
    mean = [sum(y[s : s + size]) / len(y[s : s + size]) for s in starts]
    return [x[min(s + size, len(x)) - 1] for s in starts], mean


def smoothed(y: Sequence[float]) -> list[float]:
    """A centred moving mean over about a twentieth of the series, shrinking towards both ends."""
    reach, end = len(y) // 40, len(y) - 1
    windows = [y[i - min(reach, i, end - i) : i + min(reach, i, end - i) + 1] for i in range(len(y))]
    return [sum(window) / len(window) for window in windows]


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, _px(height), label, Markup("").join(parts)
    )


def _path(css: str, x: Sequence[float], y: Sequence[float], x_axis: Axis, y_axis: Axis, dash: str) -> Markup:
    points = " ".join(f"{_px(x_axis(a))},{_px(y_axis(b))}" for a, b in zip(x, y, strict=True))
    dashes = Markup(' stroke-dasharray="{}"').format(dash) if dash else Markup("")
    return Markup('<polyline class="{}" points="{}"{}/>').format(css, points, dashes)


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(css, *map(_px, (x1, y1, x2, y2)))


def _text(css: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(css, _px(x), _px(y), anchor, text)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
