"""Numbers and findings in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from st_fast.report.arms import Arm, Cost

SPACE = "\u00a0"


def count(value: float) -> str:
    """12345.6 → 12,346."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """0.9412 → 94.1 %."""
    return f"{100 * value:.1f}{SPACE}%" if math.isfinite(value) else "–"


def plain(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def flops(value: float) -> str:
    """1.84e15 → 1.84 PFLOP."""
    if not math.isfinite(value):
        return "–"
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{SPACE}{prefix}FLOP"
    return f"{value:.3g}{SPACE}FLOP"


def duration(seconds: float) -> str:
    """200 → 3 min 20 s; the two largest units."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.2g}{SPACE}s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if left >= size or parts:
            parts.append((left // size, unit))
            left %= size
    return SPACE.join(f"{n}{SPACE}{unit}" for n, unit in parts[:2] if n)


UNITS: dict[str, Callable[[float], str]] = {
    "steps": count,
    "flops": flops,
    "seconds": duration,
    "percent": percent,
    "number": plain,
}
"""How values of a unit are written."""


def cost(value: Cost) -> str:
    """FLOPs and time, marked as a lower bound where a part isn't known."""
    return f"{'at least ' if not value.known else ''}{flops(value.flops)} and {duration(value.seconds)}"


def verdict(arms: Sequence[Arm], unfair: Sequence[str] = ()) -> tuple[str, str]:
    """Two sentences on what came out, computed from the logs: what the samples are worth, and what they cost.

    Nothing is ranked where `unfair` gives reasons why these runs can't be.
    """
    if unfair:
        return _unranked(heads(arms), unfair)
    metric, judged = _ranked(arms)
    if not judged:
        return _unjudged(heads(arms))
    if len(judged) == 1:
        return _one(judged[0], arms)
    return _several(judged, metric)


def headline(arms: Sequence[Arm]) -> Arm:
    """The arm that the verdict is about: the best evaluated one, or where none is, the last."""
    judged = _ranked(arms)[1]
    return judged[0] if judged else heads(arms)[-1]


def heads(arms: Sequence[Arm]) -> list[Arm]:
    """What each run is judged by: its last stage that was evaluated; its last stage where none was."""
    last: dict[str, Arm] = {}
    for arm in arms:
        before = last.get(arm.run.name)
        if before is None or arm.stage.evals or not before.stage.evals:
            last[arm.run.name] = arm
    return list(last.values())


def deciding_metric(arms: Sequence[Arm]) -> str:
    """FID if all evaluated ones have it, else the judge's Fréchet distance, else the share recognised."""
    evaluated = [arm for arm in arms if arm.stage.evals]
    distances = (m for m in ("fid", "frechet") if all(math.isfinite(arm.final(m)) for arm in evaluated))
    return next(distances, "accuracy") if evaluated else "accuracy"


def _ranked(arms: Sequence[Arm]) -> tuple[str, list[Arm]]:
    """The metric that decides and the heads that have it, best first."""
    evaluated = [arm for arm in heads(arms) if arm.stage.evals]
    if (metric := deciding_metric(evaluated)) != "accuracy":
        return metric, sorted(evaluated, key=lambda arm: arm.final(metric))
    accurate = [arm for arm in evaluated if math.isfinite(arm.final("accuracy"))]
    return "accuracy", sorted(accurate, key=lambda arm: -arm.final("accuracy"))


def _quality(arm: Arm) -> str:
    """“94.1 % recognised, Fréchet distance 3.2”, as far as measured."""
    parts = []
    if math.isfinite(arm.final("fid")):
        parts.append(f"FID {plain(arm.final('fid'))}")
    if math.isfinite(arm.final("accuracy")):
        parts.append(f"{percent(arm.final('accuracy'))} recognised")
    if math.isfinite(arm.final("frechet")):
        parts.append(f"Fréchet distance {plain(arm.final('frechet'))}")
    return ", ".join(parts)


def _drawing(arm: Arm) -> str:
    """“draws images of which 94 % are recognised … (unseen real images: 99 %), at …”, as far as measured."""
    parts = []
    for metric, limit, write, words in (
        ("accuracy", "classifier_accuracy", percent, "of which {} are recognised as the class asked for"),
        ("frechet", "floor_frechet", plain, "at a Fréchet distance of {} from real ones"),
        ("fid", "", plain, "at an FID of {}"),
    ):
        if math.isfinite(arm.final(metric)):
            real = f" (unseen real images: {write(arm.final(limit))})" if math.isfinite(arm.final(limit)) else ""
            parts.append(words.format(write(arm.final(metric))) + real)
    return f"draws images {', '.join(parts)}"


def _unjudged(unjudged: Sequence[Arm]) -> tuple[str, str]:
    states = []
    for arm in unjudged:
        values = arm.stage.series("train", "denoise")[1]
        loss = f" with a denoising loss of {plain(values[-1])}" if values else ""
        states.append(f"“{arm.label}” stands at step {count(arm.stage.step)} of {count(arm.stage.steps)}{loss}")
    spent = "; ".join(f"{cost(arm.total)} for “{arm.label}”" for arm in unjudged)
    nothing = "No samples were judged, so nothing can be said of their quality"
    return f"{'; '.join(states)}.", f"{nothing}; spent so far: {spent}."


def _unranked(shown: Sequence[Arm], unfair: Sequence[str]) -> tuple[str, str]:
    scores = "; ".join(f"“{arm.label}”: {_quality(arm) or 'not judged'}, for {cost(arm.total)}" for arm in shown)
    return f"These runs can't be ranked: {'; '.join(unfair)}.", f"Each for itself: {scores}."


def _one(arm: Arm, arms: Sequence[Arm]) -> tuple[str, str]:
    """One run: what its last evaluated stage reached, and beside what its teacher reached at what cost."""
    step = int(arm.stage.evals[-1]["step"])
    first = f"After {count(step)} steps, stage “{arm.stage.name}” {_drawing(arm)}."
    second = f"That took {cost(arm.total)} of training"
    if arm.stage.teacher is None and arm.stage.init is None:
        return first, f"{second}; it has no teacher, so nothing else is to be counted."
    share = arm.teacher.flops + arm.teacher_forward_flops
    if arm.teacher.known and arm.total.flops > 0:
        models = "its teacher (training it and asking it)" if arm.stage.init is None else "the models before it"
        second += f", {percent(share / arm.total.flops)} of the FLOPs for {models}"
    teacher = next((a for a in arms if a.run is arm.run and a.stage.name == arm.stage.teacher), None)
    if teacher is not None and _quality(teacher):
        second += f"; that teacher, stage “{teacher.stage.name}”, ended with {_quality(teacher)}"
        second += f", for {cost(teacher.total)}"
    return first, f"{second}."


def _several(judged: Sequence[Arm], metric: str) -> tuple[str, str]:
    """Several runs, best first: the ranking, and what share of a plain (or the next) run's cost the best needed."""
    best, others = judged[0], judged[1:]
    behind = "; ".join(f"“{arm.label}”: {_quality(arm)}" for arm in others[:3])
    more = f"; and {len(others) - 3} more" if len(others) > 3 else ""
    first = f"Of {len(judged)} runs, “{best.label}” ends best with {_quality(best)}, against {behind}{more}."
    rival = next((arm for arm in others if arm.stage.method == "none"), others[0])
    sign, goal = (1 if metric == "accuracy" else -1), rival.final(metric)
    spent, scores = best.quality(metric, "flops")
    reached = next((x for x, y in zip(spent, scores, strict=True) if sign * (y - goal) >= 0), math.nan)
    at_goal = rival.quality(metric, "flops")[0]
    if not math.isfinite(reached) or not at_goal or at_goal[-1] <= 0 or not (best.total.known and rival.total.known):
        return first, f"In all, “{best.label}” took {cost(best.total)}, and “{rival.label}” {cost(rival.total)}."
    share = reached / at_goal[-1]
    pace = f"after {percent(share)}" if share <= 1 else f"only after {plain(share)} times"
    return first, (
        f"Counting teachers' training and forward passes, it reaches the final score of “{rival.label}” {pace} "
        f"{'of its' if share <= 1 else 'its'} training FLOPs ({flops(reached)} against {flops(at_goal[-1])})."
    )
