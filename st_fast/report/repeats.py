"""Arms over several seeds against a baseline: what each reaches, at what share of the baseline's FLOPs, how surely.

Every comparison is made between runs of one seed, which saw the same samples and noise; then the seeds are put
together. All costs count the teacher's training and its forward passes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from st_fast.report.arms import Arm
from st_fast.report.collect import Record
from st_fast.report.fairness import seed_of

LOWER_IS_BETTER = {"fid": True, "frechet": True, "accuracy": False}


@dataclass(frozen=True)
class Repeats:
    """One arm's runs, by seed."""

    label: str
    by_seed: dict[int, Arm]


@dataclass(frozen=True)
class Row:
    """One arm beside the baseline; every list has an entry a seed, in `seeds`' order."""

    label: str
    seeds: list[int]
    final: list[float]
    at_cost: list[float]
    """The metric at the baseline's total FLOPs of that seed; at its last evaluation where an arm took less in all."""
    accuracy_at_cost: list[float]
    cost_share: list[float]
    """Total FLOPs, as a share of the baseline's."""
    reached: list[float | None]
    """The share of the baseline's FLOPs after which its final score was first reached; None: never."""
    better: int
    """In how many seeds `at_cost` is better than the baseline's final score."""


def group_by_seed(arms: Sequence[Arm]) -> list[Repeats]:
    """Arms whose runs differ in nothing but the seed and in where they lie, together."""
    groups: dict[str, Repeats] = {}
    for arm in arms:
        key = str(_without_seed(arm.run.recipe, seed_of(arm.run))) + arm.stage.name
        group = groups.setdefault(key, Repeats(arm.label, {}))
        group.by_seed.setdefault(seed_of(arm.run), arm)
    return list(groups.values())


def _without_seed(recipe: Record, seed: int) -> Record:
    """A recipe less its seed, its folder, and the seed in the paths of outside models: runs/seed0/teacher/align."""
    its_seed = re.compile(rf"seed[-_]?{seed}(?!\d)")
    run = {k: v for k, v in recipe.get("run", {}).items() if k not in ("seed", "out")}
    stages = [
        stage | {key: its_seed.sub("seed", str(stage[key])) for key in ("teacher", "init") if key in stage}
        for stage in recipe.get("stage", [])
    ]
    return {**recipe, "run": run, "stage": stages}


def choose_baseline(groups: Sequence[Repeats]) -> Repeats | None:
    """The first arm without any extra supervision that was evaluated; None where there is none."""
    for group in groups:
        if all(arm.stage.method == "none" and arm.stage.evals for arm in group.by_seed.values()):
            return group
    return None


def rows(groups: Sequence[Repeats], baseline: Repeats, metric: str) -> list[Row]:
    """A row for each arm that was evaluated, the baseline first; seeds that the baseline lacks are left out."""
    ordered = [baseline, *(group for group in groups if group is not baseline)]
    made = [_row(group, baseline, metric) for group in ordered]
    return [row for row in made if row.seeds]


def _row(group: Repeats, baseline: Repeats, metric: str) -> Row:
    row = Row(group.label, [], [], [], [], [], [], 0)
    better = 0
    for seed, arm in sorted(group.by_seed.items()):
        base = baseline.by_seed.get(seed)
        if base is None or not arm.stage.evals or not base.stage.evals or not arm.total.known:
            continue
        spent, scores = arm.quality(metric, "flops")
        whole, goal = base.total.flops, base.final(metric)
        if not scores or whole <= 0 or not math.isfinite(goal):
            continue
        sign = -1.0 if LOWER_IS_BETTER[metric] else 1.0
        first = next((x for x, y in zip(spent, scores, strict=True) if sign * (y - goal) >= 0), None)
        at_cost = at_budget(arm, metric, whole)
        row.seeds.append(seed)
        row.final.append(scores[-1])
        row.at_cost.append(at_cost)
        row.accuracy_at_cost.append(at_budget(arm, "accuracy", whole))
        row.cost_share.append(arm.total.flops / whole)
        row.reached.append(None if first is None else first / whole)
        better += bool(sign * (at_cost - goal) > 0)
    return Row(**{**vars(row), "better": better})


def at_budget(arm: Arm, metric: str, budget: float) -> float:
    """The metric after that much total cost, on the straight line between the evaluations before and after it.

    The last one's value if the arm spent less; NaN if it had not been evaluated by then.
    """
    spent, values = arm.quality(metric, "flops")
    after = next((i for i, x in enumerate(spent) if x >= budget * (1 - 1e-9)), None)
    if after is None:
        return values[-1] if values else math.nan
    if spent[after] <= budget * (1 + 1e-9):
        return values[after]
    if after == 0:
        return math.nan
    share = (budget - spent[after - 1]) / (spent[after] - spent[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for one value, both for none."""
    known = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan
