"""The report's figures as data: which curves and bars, against what, and what a reader should see in them.

`svg.py` and `export.py` draw them; nothing here knows how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from st_fast.report.arms import Arm


@dataclass(frozen=True)
class Curve:
    """Points of one arm. `marked`: few measured points, drawn as dots; else many noisy ones, drawn smoothed as well."""

    label: str
    x: list[float]
    y: list[float]
    colour: int
    dash: int
    marked: bool


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, such as what real images score."""

    label: str
    y: float


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. Units are keys of `UNITS`."""

    key: str
    title: str
    caption: str
    x_label: str
    x_unit: str
    y_unit: str
    log_y: bool
    curves: list[Curve]
    levels: list[Level]


@dataclass(frozen=True)
class Bar:
    """One row: a label and the sizes of its segments, in the order of the chart's segment names."""

    label: str
    sizes: list[float]
    known: bool


@dataclass(frozen=True)
class Bars:
    """Rows of stacked horizontal bars."""

    key: str
    title: str
    caption: str
    unit: str
    segments: tuple[str, ...]
    rows: list[Bar]


Figure = Chart | Bars

AXES = (
    ("step", "steps", "steps of this stage", "steps"),
    ("flops", "flops", "all training FLOPs, teacher included", "total FLOPs"),
    ("seconds", "seconds", "all training time, teacher included", "total time"),
)
"""(key of a record, unit, axis label, words in the title)."""


def losses(arms: Sequence[Arm]) -> list[Chart]:
    """The denoising loss of all arms in one chart, and a chart for each stage name's auxiliary loss."""
    charts = [
        _training(
            "loss_denoise", "Denoising loss", arms, "denoise", "number",
            "How wrong the model is about the direction from noise to image; every stage has this task, so the "
            "curves can be compared. Pale: as logged. Strong: smoothed.",
        )
    ]  # fmt: skip
    for name in dict.fromkeys(arm.stage.name for arm in arms):
        mine = [arm for arm in arms if arm.stage.name == name and any(arm.stage.series("train", "aux")[1])]
        if mine:
            caption = "The extra task of this stage alone: not to be compared between stages, except in how it falls."
            key = f"loss_aux_{len(charts)}"
            charts.append(_training(key, f"Extra loss of “{name}”", mine, "aux", "number", caption))
    return [chart for chart in charts if chart.curves]


def speed(arms: Sequence[Arm]) -> list[Chart]:
    """Images a second, the share of the machine's arithmetic in use, and the share of time without data."""
    charts = [
        _training(
            "images_per_s", "Throughput", arms, "images_per_s", "number",
            "Training images a second; pauses for saving and sampling are left out.", log=False,
        ),
        _training(
            "mfu", "Arithmetic in use (MFU)", arms, "mfu", "percent",
            "Training FLOPs a second as a share of what this machine reaches in plain matrix products.", log=False,
        ),
        _training(
            "data_wait", "Waiting for data", arms, "data_wait", "percent",
            "Share of the training time spent waiting for the next batch; close to zero is good.", log=False,
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart.curves]


def _training(
    key: str, title: str, arms: Sequence[Arm], field: str, unit: str, caption: str, log: bool = True
) -> Chart:
    curves = []
    for arm in arms:
        x, y = arm.stage.series("train", field)
        if log and field == "aux":  # zeros are steps without the extra task, not a perfect score
            x, y = [a for a, b in zip(x, y, strict=True) if b != 0], [b for b in y if b != 0]
        if x:
            curves.append(Curve(arm.label, x, y, arm.colour, arm.dash, marked=False))
    positive = all(value > 0 for curve in curves for value in curve.y)
    return Chart(key, title, caption, "steps of this stage", "steps", unit, log and positive, curves, [])


def quality(arms: Sequence[Arm]) -> list[Chart]:
    """FID, accuracy and Fréchet distance as far as measured, each against steps, total FLOPs and total time."""
    charts = []
    for metric, title, unit, floor, floor_label, captions in QUALITY:
        levels = _levels(arms, floor, floor_label)
        for (axis, x_unit, x_label, against), caption in zip(AXES, captions, strict=True):
            curves = []
            for arm in arms:
                x, y = arm.quality(metric, axis)
                if x:
                    curves.append(Curve(arm.label, x, y, arm.colour, arm.dash, marked=True))
            positive = all(value > 0 for curve in curves for value in curve.y)
            log = metric != "accuracy" and positive
            if curves:
                key, heading = f"{metric}_{axis}", f"{title}, by {against}"
                charts.append(Chart(key, heading, caption, x_label, x_unit, unit, log, curves, levels))
    return charts


QUALITY = (
    (
        "fid", "FID", "number", "", "",
        (
            "How far the drawn images are, as a crowd, from the reference's, in Inception's features. Lower is better. "
            "Figures of fewer samples are higher: compare only those of as many, against the same reference.",
            "The same against everything spent, teacher's training and teacher's forward passes included.",
            "The same against the clock.",
        ),
    ),
    (
        "accuracy", "Recognised", "percent", "classifier_accuracy", "real images",
        (
            "Share of the drawn images that the judge recognises as the class asked for. Higher is better; the dotted "
            "line is the judge on real images.",
            "The same against everything spent: a stage with a teacher starts where its teacher's training ended.",
            "The same against the clock, on the machine named below.",
        ),
    ),
    (
        "frechet", "Fréchet distance", "number", "floor_frechet", "real images",
        (
            "How far the drawn images are, as a crowd, from the real ones, in the judge's features (so this is not "
            "FID). Lower is better; the dotted line is what unseen real images score.",
            "The same against everything spent, teacher's training and teacher's forward passes included.",
            "The same against the clock.",
        ),
    ),
)  # fmt: skip
"""(metric, title, unit, metric of its limit, that line's label, a caption for each axis)."""


def _levels(arms: Sequence[Arm], metric: str, label: str) -> list[Level]:
    """One line for each value that arms disagree on; most often there is one."""
    values = dict.fromkeys(round(arm.final(metric), 9) for arm in arms if math.isfinite(arm.final(metric)))
    return [Level(label, value) for value in values]


def costs(arms: Sequence[Arm]) -> list[Bars]:
    """What each arm cost in FLOPs and in seconds, split by what it was spent on."""
    by_flops = [
        Bar(a.label, [a.own.flops - a.teacher_forward_flops, a.teacher_forward_flops, a.teacher.flops], a.total.known)
        for a in arms
    ]
    by_time = [Bar(a.label, [a.own.seconds, a.teacher.seconds], a.total.known) for a in arms]
    return [
        Bars(
            "cost_flops", "Arithmetic",
            "A teacher's training belongs to the price of what it teaches, and so does that of a model that the "
            "weights began from. Published curves usually leave it out.",
            "flops", ("the model itself", "asking the teacher", "training what came before"), by_flops,
        ),
        Bars(
            "cost_seconds", "Time",
            "Seconds of training on this machine; pauses for saving and sampling are left out.",
            "seconds", ("this stage", "training what came before"), by_time,
        ),
    ]  # fmt: skip


def all_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Every figure of the report, in its order."""
    return [*quality(arms), *losses(arms), *costs(arms), *speed(arms)]
