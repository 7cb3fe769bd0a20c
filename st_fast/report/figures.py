"""The report's figures as data: which curves and bars, over what, and what a reader should see in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from st_fast.report.arms import Arm
from st_fast.report.metrics import RANKING, Metric
from st_fast.report.validation import validated


@dataclass(frozen=True)
class Curve:
    """Points of one arm. `marked`: few measured points, drawn as dots; else many noisy ones, drawn smoothed as well.

    `ringed` are the places of points to point out; `low` and `high`, where given, the range of every point over seeds.
    """

    label: str
    x: list[float]
    y: list[float]
    colour: int
    dash: int = 0
    marked: bool = True
    ringed: list[int] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, such as what real images score."""

    label: str
    y: float


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. Units are keys of `words.UNITS`."""

    key: str
    title: str
    caption: str
    x_label: str
    x_unit: str
    y_label: str
    y_unit: str
    log_y: bool
    curves: list[Curve]
    levels: list[Level] = field(default_factory=list)


@dataclass(frozen=True)
class Bar:
    """One row: a label and the sizes of its segments, in the order of the chart's segment names."""

    label: str
    sizes: list[float]
    known: bool


@dataclass(frozen=True)
class Bars:
    """Rows of stacked horizontal bars; the last segment has the same colour in every chart."""

    key: str
    title: str
    caption: str
    unit: str
    segments: tuple[str, ...]
    rows: list[Bar]


Figure = Chart | Bars

STEPS = "steps of this stage"
AXES = (
    ("step", "steps", STEPS, "steps", ""),
    (
        "flops", "flops", "all training FLOPs, teacher included", "total FLOPs",
        "Over all FLOPs spent: a stage with a teacher starts where its teacher's training ended.",
    ),
    ("seconds", "seconds", "all training time, teacher included", "total time", "Over all training time."),
)  # fmt: skip
"""(key of a record, unit, axis label, words in the title, caption unless it is the metric's own)."""

LEARNING = (
    (
        "denoise", "Denoising loss", "mean squared error", "number", True,
        "Error of the predicted velocity. Every stage has this loss, so its curves can be compared. Pale: as logged; "
        "strong: smoothed.",
    ),
    (
        "direction", "Loss of the velocity's direction", "λ·(1 − cos)", "number", True,
        "Of stages that have it, beside the denoising loss, which is without it.",
    ),
    ("lr", "Learning rate", "learning rate", "number", False, "As scheduled at each step."),
)  # fmt: skip
VALIDATION = (
    (
        "validation_loss", "Loss on held-out records",
        "The denoising loss of fixed records, noise and times, which lie evenly. Dotted: of as many records that "
        "are trained on. Where only the held-out loss rises, the model overfits.", STEPS, "steps",
    ),
    (
        "validation_by_time", "Loss on held-out records by time",
        "At each stage's last validation. Dotted: of records that are trained on.", "t (0: data, 1: noise)", "number",
    ),
)  # fmt: skip
"""(key, title, caption, axis label, unit of the axis)."""
SPEED = (
    (
        "images_per_s", "Throughput", "images/s", "number", False,
        "Training images a second; pauses for checkpoints and samples are left out.",
    ),
    (
        "mfu", "Model FLOPs utilisation (MFU)", "MFU", "percent", False,
        "Training FLOPs a second as a share of this machine's rate in plain matrix products.",
    ),
    (
        "data_wait", "Waiting for data", "share of time", "percent", False,
        "Share of the training time spent waiting for the next batch; close to zero is good.",
    ),
)  # fmt: skip
"""(key of a training record, title, axis label, unit, whether on a logarithmic axis, caption)."""


def all_figures(arms: Sequence[Arm]) -> dict[str, list[Figure]]:
    """Every figure that the logs allow, by the section of the page it stands in."""
    denoise, direction, lr = (_training(arms, *entry) for entry in LEARNING)
    aux = []
    for number, name in enumerate(dict.fromkeys(arm.stage.name for arm in arms), start=1):
        mine, caption = [arm for arm in arms if arm.stage.name == name], "Not comparable between stages."
        drawn = _training(mine, "aux", f"Supervision loss of “{name}”", "loss", "number", True, caption)
        aux.append(replace(drawn, key=f"loss_aux_{number}"))
    charts: dict[str, list[Chart]] = {
        "quality": [_quality(arms, metric, axis) for metric in RANKING for axis in AXES],
        "losses": [replace(denoise, key="loss_denoise"), *_validation(arms), *aux, direction, lr],
        "speed": [_training(arms, *entry) for entry in SPEED],
    }
    shown: dict[str, list[Figure]] = {name: [one for one in drawn if one.curves] for name, drawn in charts.items()}
    return shown | {"costs": costs(arms)}


def _training(arms: Sequence[Arm], field: str, title: str, label: str, unit: str, log: bool, caption: str) -> Chart:
    curves = []
    for arm in arms:
        x, y = arm.stage.series("train", field)
        if field == "aux":  # zeros are steps without the auxiliary task, not a perfect score
            x, y = [a for a, b in zip(x, y, strict=True) if b != 0], [b for b in y if b != 0]
        if x:
            curves.append(Curve(arm.label, x, y, arm.colour, arm.dash, marked=False))
    return Chart(field, title, caption, STEPS, "steps", label, unit, log and _positive(curves), curves)


def _validation(arms: Sequence[Arm]) -> list[Chart]:
    """The held-out loss over the steps and, at the last validations, over the time; a dash for each kind of records."""
    found, y, drawn = validated(arms), "mean squared error", list[Chart]()
    for key, title, caption, x, unit in VALIDATION:
        points = [(one, one.over_steps if unit == "steps" else one.over_time) for one in found]
        curves = [Curve(one.label, *series, one.arm.colour, one.dash) for one, series in points if series[0]]
        drawn.append(Chart(key, title, caption, x, unit, y, "number", _positive(curves), curves))
    return drawn


def _quality(arms: Sequence[Arm], metric: Metric, axis: tuple[str, str, str, str, str]) -> Chart:
    """A metric over one axis; the arm that ends best is ringed where there are several."""
    name, unit, label, over, caption = axis
    finals = {arm.label: metric.sign * arm.final(metric.key) for arm in arms if math.isfinite(arm.final(metric.key))}
    best = max(finals, key=lambda one: finals[one]) if len(finals) > 1 else None
    curves = []
    for arm in arms:
        x, y = arm.quality(metric.key, name)
        if x:
            ringed = [len(x) - 1] if arm.label == best else []
            curves.append(Curve(arm.label, x, y, arm.colour, arm.dash, ringed=ringed))
    floors = [round(arm.final(metric.floor), 9) for arm in arms if math.isfinite(arm.final(metric.floor))]
    return Chart(
        f"{metric.key}_{name}", f"{metric.title} over {over}",
        (caption or metric.caption) + (f" The ring marks what ends best: “{best}”." if best and not caption else ""),
        label, unit, metric.title, metric.unit, metric.unit == "number" and _positive(curves), curves,
        [Level("real images", value) for value in dict.fromkeys(floors)],
    )  # fmt: skip


def _positive(curves: Sequence[Curve]) -> bool:
    return all(value > 0 for curve in curves for value in curve.y)


def costs(arms: Sequence[Arm]) -> list[Figure]:
    """What each arm cost in FLOPs and in seconds, split by what it was spent on."""
    by_flops = [
        Bar(a.label, [a.own.flops - a.teacher_forward_flops, a.teacher_forward_flops, a.teacher.flops], a.total.known)
        for a in arms
    ]
    by_time = [Bar(arm.label, [arm.own.seconds, arm.teacher.seconds], arm.total.known) for arm in arms]
    before = "training the models before it"
    return [
        Bars(
            "cost_flops", "Training FLOPs",
            "Training a teacher, or a model that the weights began from, is part of the cost. Published curves usually "
            "leave it out.", "flops", ("the model itself", "the teacher's forward passes", before), by_flops,
        ),
        Bars(
            "cost_seconds", "Training time", "On this machine; pauses for checkpoints and samples are left out.",
            "seconds", ("this stage", before), by_time,
        ),
    ]  # fmt: skip
