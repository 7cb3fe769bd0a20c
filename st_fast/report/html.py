"""One self-contained page from run folders: no script, no external resource, everything from logs escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from st_fast.report import explain, figures, samples, svg, words
from st_fast.report.arms import Arm, make_arms
from st_fast.report.collect import RunLog, number
from st_fast.report.compare import differences, warnings
from st_fast.report.fairness import seed_of, unfair
from st_fast.report.probes import read_probes
from st_fast.report.verdict_table import verdict_table


@dataclass(frozen=True)
class Drawn:
    """A figure as SVG or as bars, and its legend: (css class, dash, label)."""

    figure: figures.Figure
    legend: list[tuple[str, str, str]]
    svg: Markup | None = None
    bars: tuple[DrawnBar, ...] = ()


@dataclass(frozen=True)
class DrawnBar:
    """A row of a bar chart: its label, its sum, and for each segment (css class, width in percent, words)."""

    label: str
    total: str
    segments: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Strip:
    """The sample grids of one stage."""

    arm: Arm
    grids: list[samples.Grid]


def render(runs: Sequence[RunLog], seeds_declared: bool = False) -> str:
    """The page as HTML text; `seeds_declared`: runs that differ in their seed are repetitions."""
    reasons = unfair(runs, seeds_declared)
    table = None if reasons else verdict_table(make_arms(runs))
    verdict = table.sentences if table and seeds_declared else None
    every, runs = runs, [run for run in runs if not seeds_declared or seed_of(run) == seed_of(runs[0])]
    arms = make_arms(runs)
    notes = [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]
    unknown = [arm for arm in arms if not arm.total.known]
    notes += [f"{_model_before(arm)} “{arm.label}” cost isn't recorded here; its totals lack it." for arm in unknown]
    if len(runs) < len(every):
        notes.append(f"Curves and pictures are of seed {seed_of(runs[0])}; the verdict is over all {len(every)} runs.")
    strips = [Strip(arm, samples.strip(arm, notes)) for arm in arms]
    heads = words.heads(arms)
    same_noise = [arm for arm in heads if seed_of(arm.run) == seed_of(heads[0].run)]
    budget, grids = samples.at_budget(same_noise, notes)
    context: dict[str, Any] = {
        "title": ", ".join(run.name for run in runs),
        "verdict": verdict or words.verdict(arms, reasons),
        "table": table,
        "probes": read_probes(runs, notes),
        "hero": samples.last(words.headline(arms), notes),
        "warnings": warnings(runs, arms, reasons),
        "notes": notes,
        "cards": explain.cards(arms),
        "quality": [draw(figure) for figure in figures.quality(arms)],
        "losses": [draw(figure) for figure in figures.losses(arms)],
        "costs": [draw(figure) for figure in figures.costs(arms)],
        "speed": [draw(figure) for figure in figures.speed(arms)],
        "strips": [strip for strip in strips if strip.grids],
        "budget": budget,
        "budget_grids": grids,
        "rows": _rows(arms),
        "differences": differences(runs),
        "runs": runs,
        "machines": [_machine(run) for run in runs],
        "style": Markup(_resource("style.css")),
        "flops": words.flops,
        "count": words.count,
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_resource("page.html")).render(context)


def draw(figure: figures.Figure) -> Drawn:
    """A figure's legend and its drawing; bars are plain boxes, so that their text keeps its size on a phone."""
    if isinstance(figure, figures.Chart):
        curves = [(f"c{c.colour % svg.COLOURS}", svg.DASHES[c.dash % len(svg.DASHES)], c.label) for c in figure.curves]
        return Drawn(figure, curves, svg=svg.chart(figure))
    # The last segment, a teacher's training, looks the same in every chart.
    css = [f"s{n}" for n in range(len(figure.segments) - 1)] + ["s2"]
    write = words.UNITS[figure.unit]
    most = max(sum(row.sizes) for row in figure.rows) or 1.0
    present = [n for n in range(len(css)) if any(row.sizes[n] > 0 for row in figure.rows)]
    rows = []
    for row in figure.rows:
        words_of = [f"{name}: {write(size)}" for name, size in zip(figure.segments, row.sizes, strict=True)]
        segments = [(css[n], f"{100 * row.sizes[n] / most:.2f}", words_of[n]) for n in present]
        rows.append(DrawnBar(row.label, ("" if row.known else "at least ") + write(sum(row.sizes)), segments))
    return Drawn(figure, [(css[n], "", figure.segments[n]) for n in present], bars=tuple(rows))


def _model_before(arm: Arm) -> str:
    if arm.stage.init is None:
        return "What the teacher of"
    return "What the model before" if arm.stage.teacher in (None, arm.stage.init) else "What a model before"


def _rows(arms: Sequence[Arm]) -> list[dict[str, str]]:
    """The table of results without the columns of metrics that nobody took."""
    lines = [_row(arm) for arm in arms]
    empty = [column for column in ("FID", "sFID", "Inception Score") if all(line[column] == "–" for line in lines)]
    return [{column: cell for column, cell in line.items() if column not in empty} for line in lines]


def _row(arm: Arm) -> dict[str, str]:
    """One line of the table of results: column → text; empty where nothing was measured."""
    speeds, used = (arm.stage.series("train", key)[1] for key in ("images_per_s", "mfu"))
    bound = "" if arm.total.known else "≥ "
    cells = {
        "Stage": arm.label,
        "Steps": words.count(arm.stage.step),
        "FID": words.plain(arm.final("fid")),
        "sFID": words.plain(arm.final("sfid")),
        "Inception Score": words.plain(arm.final("inception_score")),
        "Recognised": words.percent(arm.final("accuracy")),
        "Fréchet distance": words.plain(arm.final("frechet")),
        "Precision": words.percent(arm.final("precision")),
        "Recall": words.percent(arm.final("recall")),
        "FLOPs, own": words.flops(arm.own.flops),
        "FLOPs, with teacher": bound + words.flops(arm.total.flops),
        "Time, own": words.duration(arm.own.seconds),
        "Time, with teacher": bound + words.duration(arm.total.seconds),
        "Images/s": words.plain(_median(speeds)),
        "MFU": words.percent(_median(used)),
    }
    return cells


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else math.nan


def _machine(run: RunLog) -> str:
    """One line on what a run ran on."""
    start = next((stage.start for stage in run.stages if stage.start), {})
    parts = [run.name]
    if isinstance(start.get("device"), str):
        parts.append(start["device"])
    speed = number(start, "matmul_flops_per_s")
    if math.isfinite(speed):
        parts.append(f"{words.flops(speed)}/s in plain matrix products")
    if math.isfinite(number(start, "trunk_params")):
        parts.append(f"{words.count(number(start, 'trunk_params'))} parameters in the network that draws")
    versions = start.get("versions")
    if isinstance(versions, dict):
        parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return " · ".join(parts)


def _resource(name: str) -> str:
    return files("st_fast.report").joinpath(name).read_text(encoding="utf-8")
