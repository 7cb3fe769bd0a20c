"""The table of scores: what each stage's samples score, what real images do, and how all of it was measured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.collect import number
from st_fast.report.metrics import METRICS, Metric

REAL = "Real images"


@dataclass(frozen=True)
class Scores:
    """A line a scored stage, lines of real images, and sentences on how they were measured; all empty without any."""

    head: list[str]
    lines: list[list[str]]
    real: list[list[str]]
    protocol: list[str]


def table(arms: Sequence[Arm]) -> Scores:
    """The last scores of every stage that has some; metrics that nobody took have no column."""
    scored = [arm for arm in arms if arm.stage.evals]
    taken = [m for m in METRICS.values() if any(math.isfinite(arm.final(m.key)) for arm in scored)]
    if not taken:
        return Scores([], [], [], [])
    head = ["Stage", "Scored at step", *(f"{m.title} {'↓' if m.lower_is_better else '↑'}" for m in taken)]
    lines = [
        [arm.label, words.count(arm.stage.evals[-1]["step"]), *(m.write(arm.final(m.key)) for m in taken)]
        for arm in scored
    ]
    return Scores(head, lines, _real(scored, taken), _protocol(scored))


def _real(arms: Sequence[Arm], taken: Sequence[Metric]) -> list[list[str]]:
    """What real images score: one line where it is the same for all, otherwise one for the arms that share it."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        floors = tuple(m.write(arm.final(m.floor)) if m.floor else "–" for m in taken)
        if any(text != "–" for text in floors):
            rows.setdefault(floors, []).append(arm.label)
    return [
        [REAL if len(rows) == 1 else f"{REAL}, as for {', '.join(labels)}", "", *floors]
        for floors, labels in rows.items()
    ]


def _protocol(arms: Sequence[Arm]) -> list[str]:
    """How scores were taken, a sentence each: once where that is the same for all arms, otherwise for each."""
    parts: list[tuple[str, Callable[[Arm], str]]] = [
        ("Samples", _samples), ("Classifier", _classifier), ("Real images", _held_out), ("Inception", _inception),
    ]  # fmt: skip
    found = []
    for title, tell in parts:
        told: dict[str, list[str]] = {}
        for arm in arms:
            if text := tell(arm):
                told.setdefault(text, []).append(arm.label)
        if len(told) == 1:
            found.append(f"{title}: {next(iter(told))}.")
        elif told:
            each = [f"{text} ({', '.join(labels)})" for text, labels in told.items()]
            found.append(f"{title}: {'; '.join(each)}.")
    return found


def _samples(arm: Arm) -> str:
    metrics = arm.last_metrics
    parts = [f"{words.count(number(metrics, 'num'))} each"] * math.isfinite(number(metrics, "num"))
    if "sampler" in metrics:
        steps = f" in {metrics['steps']} steps" if "steps" in metrics else ""
        shift = f" shifted by {metrics['shift']}" if "shift" in metrics else ""
        parts.append(f"sampler {metrics['sampler']}{steps}{shift}")
    if "cfg_scale" in metrics:
        scale, interval = metrics["cfg_scale"], _interval(arm)
        dropped = " by path drop" * (metrics.get("guidance") == "path_drop")
        parts.append("no guidance" if scale == 1 else f"guidance scale {scale}{dropped}{interval}")
    if "internal_guidance" in metrics:
        parts.append(f"Internal Guidance {metrics['internal_guidance']}{_interval(arm, 'internal_range')}")
    return ", ".join(parts)


def _interval(arm: Arm, key: str = "cfg_range") -> str:
    """“ for times 0 to 0.7”: where guidance acts, if not at all times."""
    sample = arm.run.recipe.get("sample", {})
    limits = sample.get(key) if isinstance(sample, dict) else None
    if not isinstance(limits, list) or len(limits) != 2 or limits == [0, 1]:
        return ""
    return f" for times {limits[0]} to {limits[1]}"


def _classifier(arm: Arm) -> str:
    digest = arm.last_metrics.get("classifier_digest") or arm.last_metrics.get("attributes_digest")
    return f"SHA-256 {digest[:12]}" if isinstance(digest, str) else ""


def _held_out(arm: Arm) -> str:
    count = number(arm.last_metrics, "floor_num")
    return f"{words.count(count)} held-out ones" if math.isfinite(count) else ""


def _inception(arm: Arm) -> str:
    metrics = arm.last_metrics
    if not isinstance(metrics.get("inception_sha256"), str):
        return ""
    reference, digest = metrics.get("reference", "unknown"), str(metrics.get("reference_sha256", ""))[:12]
    return f"weights {metrics['inception_sha256'][:12]}, reference {reference} {digest}".rstrip()
