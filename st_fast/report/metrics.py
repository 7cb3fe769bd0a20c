"""Every metric of generated images, declared once. Whoever computes one logs it under its key; the rest reads this."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from st_fast.report.words import UNITS


@dataclass(frozen=True)
class Metric:
    """A metric of the samples that an "eval" record holds under `metrics`.

    `floor` is the key of what real held-out images score. One with a `caption` is drawn as curves and can rank runs.
    """

    key: str
    title: str
    unit: Literal["number", "percent"]
    lower_is_better: bool
    features: Literal["inception", "classifier", "attributes", "clip"]
    floor: str = ""
    caption: str = ""

    @property
    def sign(self) -> int:
        """1 where higher is better, −1 where lower is."""
        return -1 if self.lower_is_better else 1

    def write(self, value: float) -> str:
        """A value with its unit; "–" for NaN."""
        return UNITS[self.unit](value)


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "fid", "FID", "number", True, "inception", caption="Distance between generated and reference images in "
            "Inception's features. Lower is better. Fewer samples raise it: compare equal numbers and one reference.",
        ),
        Metric(
            "frechet", "Fréchet distance", "number", True, "classifier", "floor_frechet", "Distance between generated "
            "and real images in the classifier's features, so this is not FID. Lower is better; the dotted line is "
            "what held-out real images score.",
        ),
        Metric(
            "accuracy", "Accuracy", "percent", False, "classifier", "classifier_accuracy", "Share of generated images "
            "that the classifier assigns to the class asked for. Higher is better; the dotted line is the classifier "
            "on held-out real images.",
        ),
        Metric(
            "held_out", "Right, never seen", "percent", False, "attributes", "real_held_out", "Share of images "
            "drawn for combinations of attributes that training never saw in which the classifier reads all of them "
            "right. Higher is better; the dotted line is the classifier on real images of these combinations.",
        ),
        Metric(
            "seen", "Right, seen", "percent", False, "attributes",
            caption="The same for combinations that training saw.",
        ),
        Metric(
            "retrieved", "Retrieved", "percent", False, "attributes", caption="Share of images drawn for captions of "
            "objects, and of whatever else has no attributes, whose own real image is among the five nearest.",
        ),
        *(
            Metric(f"{of}_{what}", f"{title}: {what}", "percent", False, "attributes")
            for of, title in (("held_out", "Never seen"), ("seen", "Seen")) for what in ("tone", "gender", "role")
        ),
        Metric("clip_score", "CLIP score", "number", False, "clip"),
        Metric("sfid", "sFID", "number", True, "inception"),
        Metric("kid", "KID", "number", True, "inception"),
        Metric("inception_score", "Inception Score", "number", False, "inception"),
        Metric("inception_precision", "Precision (Inception)", "percent", False, "inception"),
        Metric("inception_recall", "Recall (Inception)", "percent", False, "inception"),
        Metric("precision", "Precision", "percent", False, "classifier", "floor_precision"),
        Metric("recall", "Recall", "percent", False, "classifier", "floor_recall"),
    )
}  # fmt: skip
"""By key. The first with a caption that all runs have decides which is best."""

RANKING = [metric for metric in METRICS.values() if metric.caption]

NUMBERS = {"num", "floor_num", *METRICS, *(metric.floor for metric in METRICS.values() if metric.floor)}
"""Keys of an evaluation's `metrics` that must hold numbers."""


def apart(values: Mapping[str, object]) -> tuple[dict[str, float], dict[str, float]]:
    """What samples score, by the keys in `values`, and what held-out real images do, by the metric's key.

    Finite numbers only. Neither has a count, a setting or a hash, nor what the samples' classes score one by one.
    """
    real = {metric.floor: metric.key for metric in METRICS.values() if metric.floor}
    numbers = {key: number for key, value in values.items() if (number := _finite(value)) is not None}
    of_samples = {key: number for key, number in numbers.items() if key not in real and metric_of(key) in METRICS}
    return of_samples, {real[key]: number for key, number in numbers.items() if key in real}


def metric_of(key: str) -> str:
    """The metric of a key: evaluate's classifier has a prefix, a standard deviation an ending."""
    return key.removeprefix("classifier_").removesuffix("_std")


def summary(values: Mapping[str, object], with_real: bool = True) -> str:
    """“Fréchet distance 3.2 (real images: 0.15), accuracy 94.1 %”: what is known of the metrics that rank runs.

    with_real: with what real images score, in brackets.
    """
    parts = []
    for metric in RANKING:
        value, floor = _finite(values.get(metric.key)), _finite(values.get(metric.floor))
        if value is not None:
            title = metric.title if metric.unit == "number" else metric.title.lower()
            real = f" (real images: {metric.write(floor)})" if floor is not None and with_real else ""
            parts.append(f"{title} {metric.write(value)}{real}")
    return ", ".join(parts)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
