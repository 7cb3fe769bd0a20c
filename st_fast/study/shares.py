"""Where does stage 2 start to pay? The gain over plain training by the teacher's share of the budget. Imports no torch.

Of studies with `horizons`: every arm with a trained teacher is read where its total FLOPs, teacher included, reach each
horizon. As a shorter run is the beginning of a longer one, one run gives a point for every horizon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.report import plot, words
from st_fast.report.arms import Arm
from st_fast.report.figures import Chart, Curve, Level
from st_fast.report.repeats import spread
from st_fast.study.seeds import METRIC, Seed, complete


@dataclass(frozen=True)
class Shares:
    """One study's plain arm and taught arms, a list over its complete seeds each, and its horizons in FLOPs."""

    title: str
    horizons: tuple[float, ...]
    plain: list[Arm]
    taught: list[list[Arm]]


@dataclass(frozen=True)
class Point:
    """A teacher's share of a horizon, and by how much less distance than plain training the student ends, by seed."""

    share: float
    gains: list[float]


def read_shares(folder: Path) -> list[Shares]:
    """Of every study with horizons and several teachers whose seeds' files lie in the folder.

    Seeds that lack an arm are left out.
    """
    studies = [group for group in complete(folder).values() if group[0][0].get("horizons")]
    found = [_shares(*map(list, zip(*group, strict=True))) for group in studies]
    return [one for one in found if len(one.taught) > 1]


def checked_horizons(told: Sequence[dict[str, Any]], seeds: Sequence[Seed]) -> tuple[tuple[float, ...], str]:
    """A study's horizons and its baseline; UserError where its seeds' files don't name them, or others."""
    horizons, baseline = told[0]["horizons"], str(told[0].get("baseline"))
    right = isinstance(horizons, list) and all(type(one) in (int, float) and one > 0 for one in horizons)
    if not right or any(baseline not in seed.arms for seed in seeds):
        raise UserError(f"{told[0].get('study')}: its seeds' files don't name horizons and a baseline")
    if any(one.get("horizons") != horizons for one in told):
        raise UserError(f"{told[0].get('study')}: its seeds' files name different horizons; write them anew")
    return tuple(map(float, horizons)), baseline


def _shares(told: list[dict[str, Any]], seeds: list[Seed]) -> Shares:
    horizons, baseline = checked_horizons(told, seeds)
    by_cost = sorted(seeds[0].arms, key=lambda name: seeds[0].arms[name].teacher.flops)
    taught = [name for name in by_cost if all(name in s.arms and s.arms[name].teacher.flops > 0 for s in seeds)]
    return Shares(
        str(told[0].get("title")),
        horizons,
        [seed.arms[baseline] for seed in seeds],
        [[seed.arms[name] for seed in seeds] for name in taught],
    )


def point(arms: Sequence[Arm], plain: Sequence[Arm], horizon: float) -> Point | None:
    """The share and gains of one arm at a horizon; None where no student had been scored by then.

    A gain is plain training's distance divided by the arm's, both at the horizon: above 1 the teacher pays.
    """
    scores = [
        (base.at(METRIC, "flops", horizon), arm.at(METRIC, "flops", horizon))
        for arm, base in zip(arms, plain, strict=True)
    ]
    gains = [theirs / ours for theirs, ours in scores if math.isfinite(theirs) and math.isfinite(ours) and ours > 0]
    if len(gains) < len(arms):
        return None
    return Point(arms[0].teacher.flops / horizon, gains)


def overtakes(arm: Arm, plain: Arm) -> float | None:
    """Total FLOPs of the arm's first evaluation that beats plain training at the same FLOPs; None: none does."""
    for flops, score in zip(*arm.quality(METRIC, "flops"), strict=True):
        theirs = plain.at(METRIC, "flops", flops)
        if math.isfinite(theirs) and score < theirs:
            return flops
    return None


def chart(shares: Shares) -> Chart:
    """Gain over plain against the teacher's share, a curve a horizon, the range over seeds shaded."""
    curves = []
    for place, horizon in enumerate(shares.horizons):
        found = [one for arms in shares.taught if (one := point(arms, shares.plain, horizon)) is not None]
        if not found:
            continue
        gains = np.array([one.gains for one in found])
        curves.append(
            Curve(f"{words.flops(horizon)} in all", [one.share for one in found], list(map(mean_gain, found)), place,
                  low=gains.min(axis=1).tolist(), high=gains.max(axis=1).tolist())
        )  # fmt: skip
    label = "plain distance / stage-2 distance"
    return Chart("", shares.title, "", "share of the budget that trained the teacher", "percent", label, "number", True,
                 curves, [Level("as good as plain", 1.0)])  # fmt: skip


def table(shares: Shares) -> str:
    """A row a teacher: its training's FLOPs, where its student overtakes plain training, its gain at every horizon."""
    head = [
        "Teacher trained for",
        "Overtakes plain training at",
        *(f"Gain at {words.flops(h)}" for h in shares.horizons),
    ]
    lines = [head, ["---"] * len(head)]
    for arms in shares.taught:
        first = [overtakes(arm, base) for arm, base in zip(arms, shares.plain, strict=True)]
        known = [flops for flops in first if flops is not None]
        when = (
            f"{words.flops(spread(known)[0])} ({len(known)} of {len(first)})" if known else f"never (0 of {len(first)})"
        )
        cells = [words.flops(arms[0].teacher.flops), when]
        for horizon in shares.horizons:
            one = point(arms, shares.plain, horizon)
            cells.append("–" if one is None else f"{gain(one)}, share {words.percent(one.share)}")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def mean_gain(one: Point) -> float:
    """The geometric mean over the seeds: twice as good and half as good make 1."""
    return math.exp(math.fsum(map(math.log, one.gains)) / len(one.gains))


def gain(one: Point) -> str:
    """“0.72 (0.65 to 0.81)”: the mean, lowest and highest; one seed's alone."""
    low, high = (words.plain(f(one.gains)) for f in (min, max))
    return words.plain(mean_gain(one)) + f" ({low} to {high})" * (len(one.gains) > 1)


def sentence(shares: Shares) -> str:
    """The best share at every horizon, and in how many seeds it pays there."""
    parts = []
    for horizon in shares.horizons:
        found = [one for arms in shares.taught if (one := point(arms, shares.plain, horizon)) is not None]
        if found:
            best = max(found, key=mean_gain)
            wins = sum(gain > 1 for gain in best.gains)
            parts.append(
                f"at {words.flops(horizon)} the best of {len(found)} shares is {words.percent(best.share)}: gain "
                f"{gain(best)}, above 1 in {wins} of {len(best.gains)} seeds"
            )
    return f"**{shares.title}:** {'; '.join(parts) or 'no student had been scored at any budget'}."


def section(found: Sequence[Shares], picture: str) -> str:
    """The page's section on all studies with horizons."""
    return "\n".join([
        "## Where does it start to pay?\n",
        "Each teacher was trained once and has one student, which is read at several budgets; the budget holds the "
        "teacher's training and its forward passes. The gain is plain training's Fréchet distance divided by the "
        "student's at the same total FLOPs: above 1 the teacher has paid for itself. “Overtakes”: the total FLOPs of "
        "the first evaluation that beats plain training's at the same FLOPs, mean over the seeds that have one. Gains "
        "are geometric means over the seeds (lowest to highest).\n",
        *[f"- {sentence(one)}" for one in found],
        f"\n![Gain over plain training by the teacher's share; the range over seeds is shaded]({picture})\n",
        *[f"{one.title}, {len(one.plain)} seed{'s' * (len(one.plain) != 1)}:\n\n{table(one)}" for one in found],
    ])  # fmt: skip


def draw(found: Sequence[Shares], path: Path) -> None:
    """The figure: a panel a study."""
    plot.save(plot.sheet([[chart(one) for one in found]], 4.6, 3.6, common=False), path, dpi=110)
