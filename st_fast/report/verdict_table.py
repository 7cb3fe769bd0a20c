"""The verdict's rows in words: one table for the page and for a study's Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.repeats import LOWER_IS_BETTER, Repeats, Row, choose_baseline, group_by_seed, rows, spread


@dataclass(frozen=True)
class VerdictTable:
    """Column heads, a line of cells an arm, and what the columns mean."""

    head: list[str]
    lines: list[list[str]]
    note: str
    sentences: tuple[str, str]
    """What came out over the seeds, and what it takes to get there."""


def verdict_table(arms: Sequence[Arm]) -> VerdictTable | None:
    """What each run's last evaluated stage reached beside plain training; None without a plain run or anything else."""
    groups = named(group_by_seed(words.heads(arms)))
    baseline = choose_baseline(groups)
    if baseline is None:
        return None
    metric = words.deciding_metric(words.heads(arms))
    found = rows(groups, baseline, metric)
    return in_words(found, metric) if len(found) > 1 and found[0].label == baseline.label else None


def named(groups: Sequence[Repeats]) -> list[Repeats]:
    """Groups of several runs under their stage's name, where no other group has it; else under their first run's."""
    stages = [next(iter(group.by_seed.values())).stage.name for group in groups]
    return [
        Repeats(stage, group.by_seed) if len(group.by_seed) > 1 and stages.count(stage) == 1 else group
        for stage, group in zip(stages, groups, strict=True)
    ]


def in_words(found: Sequence[Row], metric: str) -> VerdictTable:
    """The rows, the baseline's first, as text."""
    base = found[0].label
    name, write = METRICS[metric]
    head = ["Arm", f"{name} at the same cost", "Recognised", "Better", f"Final {name}"]
    head += [f"All FLOPs, of “{base}”", "Reaches its final score after"]
    lines = []
    for row in found:
        better = "" if row is found[0] else f"{row.better} of {len(row.seeds)}"
        cells = [row.label, told(row.at_cost, write), told(row.accuracy_at_cost, words.percent), better]
        cells += [told(row.final, write), words.percent(spread(row.cost_share)[0]), reach(row)]
        lines.append(cells)
    note = (
        "Mean ± standard deviation over the seeds; runs are compared with the one of their own seed. “At the same "
        f"cost”: at the FLOPs that “{base}” took in all, teachers included, on the straight line between two scores; "
        f"an arm that took less ends earlier. “Better”: in how many seeds that beats the final score of “{base}”. "
        "“Reaches its final score after”: the first score that good, as a share of its FLOPs, mean of the seeds that "
        f"have one (lowest to highest); scores are noisy, so “{base}” itself may reach its own before its end."
    )
    return VerdictTable(head, lines, note, sentences(found, metric))


def sentences(found: Sequence[Row], metric: str) -> tuple[str, str]:
    """The best arm beside the baseline, over all seeds."""
    base, others = found[0], found[1:]
    if not others:
        return f"“{base.label}” stands alone.", ""
    name, write = METRICS[metric]
    sign = 1 if LOWER_IS_BETTER[metric] else -1
    best = min(others, key=lambda row: sign * spread(row.at_cost)[0])
    n, score, goal = len(best.seeds), told(best.at_cost, write), told(base.final, write)
    over = f"Over {n} seed{'s' * (n != 1)}"
    if sign * (spread(best.at_cost)[0] - spread(base.final)[0]) < 0:
        first = f"{over}, “{best.label}” does best at the cost of “{base.label}”: {name} {score}, against {goal}."
    else:
        first = f"{over}, no arm beats “{base.label}” ({name} {goal}) at its cost; next is “{best.label}” with {score}."
    return first, (
        f"“{best.label}” is better in {best.better} of {n}. Teachers included, it reaches the final score of "
        f"“{base.label}” after this share of its FLOPs: {reach(best)}."
    )


METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "fid": ("FID", words.plain),
    "frechet": ("Fréchet distance", words.plain),
    "accuracy": ("share recognised", words.percent),
}


def told(values: Sequence[float], write: Callable[[float], str]) -> str:
    """“4.2 ± 0.3”; the mean alone for one value."""
    mean, deviation = spread(values)
    return f"{write(mean)} ± {write(deviation)}" if math.isfinite(deviation) else write(mean)


def reach(row: Row) -> str:
    """“62.0 % (58.1 % to 66.4 %), 3 of 3”, or that it never does."""
    shares = [share for share in row.reached if share is not None]
    if not shares:
        return f"never, 0 of {len(row.reached)}"
    span = f" ({words.percent(min(shares))} to {words.percent(max(shares))})" if len(shares) > 1 else ""
    return f"{words.percent(spread(shares)[0])}{span}, {len(shares)} of {len(row.reached)}"
