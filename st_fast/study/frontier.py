"""Which arm leads at which budget? Every arm beside plain training at equal total FLOPs. Imports no torch.

Of studies with `horizons` and several arms without a teacher of their own. As a shorter run is the beginning of a
longer one, one run gives a point for every horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.recipe.schema import Sample
from st_fast.report import plot, words
from st_fast.report.arms import Arm
from st_fast.report.figures import Chart, Curve, Level
from st_fast.report.repeats import spread
from st_fast.study.plan import EXTERNAL
from st_fast.study.seeds import METRIC, Seed, complete
from st_fast.study.shares import Point, checked_horizons, gain, mean_gain, point

DRAWING = (
    "sampler", "steps", "cfg_scale", "cfg_range", "guidance", "internal_guidance", "internal_range", "contrast",
    "shift",
)  # fmt: skip
"""Keys of [sample] by which samples are better or worse whatever training did."""
IN_A_ROW = 3
"""Panels of the figure."""
POINTS = 60
"""Budgets at which the figure's curves are read."""


@dataclass(frozen=True)
class Contender:
    """An arm beside plain training: its runs by seed, and its gain at every horizon."""

    title: str
    panel: str
    arms: list[Arm]
    points: list[Point | None]
    """None where a seed had not been scored by then."""
    drawn_otherwise: bool = False
    """Whether its samples are drawn in another way than plain training's, such as with guidance."""

    @property
    def external(self) -> bool:
        """Whether it needs a network from elsewhere."""
        return self.arms[0].stage.method in EXTERNAL

    def wins(self, place: int) -> int:
        """In how many seeds it is ahead at a horizon."""
        found = self.points[place]
        return 0 if found is None else sum(one > 1 for one in found.gains)


@dataclass(frozen=True)
class Frontier:
    """One study: its horizons, plain training's runs, and every other arm, best first at the largest horizon."""

    title: str
    horizons: tuple[float, ...]
    plain: list[Arm]
    contenders: list[Contender]


def read_frontiers(folder: Path) -> list[Frontier]:
    """Of every such study whose seeds' files lie in the folder; seeds that lack an arm are left out."""
    groups = [group for group in complete(folder).values() if group[0][0].get("horizons")]
    found = [_frontier(*map(list, zip(*group, strict=True))) for group in groups]
    return [one for one in found if sum(c.arms[0].teacher.flops == 0 for c in one.contenders) > 1]


def _frontier(told: list[dict[str, Any]], seeds: list[Seed]) -> Frontier:
    horizons, baseline = checked_horizons(told, seeds)
    plain = [seed.arms[baseline] for seed in seeds]
    panels = {str(arm["name"]): str(arm.get("panel", "")) for arm in told[0]["arms"]}
    contenders = []
    for name in seeds[0].arms:
        if name != baseline and all(name in seed.arms for seed in seeds):
            arms = [seed.arms[name] for seed in seeds]
            title = next(str(arm.get("title", name)) for arm in told[0]["arms"] if arm["name"] == name)
            points = [point(arms, plain, one) for one in horizons]
            otherwise = _drawing(arms[0]) != _drawing(plain[0])
            contenders.append(Contender(title, panels[name], arms, points, otherwise))
    contenders.sort(key=lambda one: -_last(one))
    return Frontier(str(told[0].get("title")), horizons, plain, contenders)


def _drawing(arm: Arm) -> dict[str, object]:
    """How an arm's samples are drawn: the keys of DRAWING with their values."""
    sample = arm.run.recipe.get("sample", {})
    values = {key: sample.get(key, getattr(Sample(), key)) for key in DRAWING}  # an older run lacks a later key
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _last(one: Contender) -> float:
    """The mean gain at the largest horizon at which there is one."""
    return next((mean_gain(found) for found in reversed(one.points) if found is not None), 0.0)


def charts(found: Frontier) -> list[Chart]:
    """Gain over plain training against the budget, a curve an arm: a panel a kind of arm, as the study has them."""
    most = found.horizons[-1]
    budgets = np.geomspace(found.horizons[0] / 2, most, POINTS).tolist()
    panels = list(dict.fromkeys(one.panel for one in found.contenders))
    made = []
    for panel in panels:
        curves = []
        for place, one in enumerate(c for c in found.contenders if c.panel == panel):
            known = [(b, p) for b in budgets if (p := point(one.arms, found.plain, b)) is not None]
            if known:
                gains = np.array([p.gains for _, p in known])
                means = [mean_gain(p) for _, p in known]
                low, high = gains.min(axis=1).tolist(), gains.max(axis=1).tolist()
                curves.append(Curve(one.title, [b for b, _ in known], means, place, low=low, high=high))
        made.append(
            Chart("", panel or found.title, "", "all training FLOPs, teacher included", "flops",
                  "plain distance / arm's distance", "number", True, curves, [Level("as good as plain", 1.0)])
        )  # fmt: skip
    return made


def ahead_from(arm: Arm, plain: Arm) -> tuple[float | None, float | None]:
    """Total FLOPs of the evaluation from which on each one beats plain training at the same FLOPs, and of the last.

    None for the first where the last evaluation of all does not; for both where none does. The first that does so at
    all would be one of noise: soon after the start an arm's lead says nothing of its end.
    """
    since = last = None
    for flops, score in zip(*arm.quality(METRIC, "flops"), strict=True):
        ahead = score < plain.at(METRIC, "flops", flops)  # NaN, before plain training was scored, is no lead
        since = (flops if since is None else since) if ahead else None
        last = flops if ahead else last
    return since, last


def lead(one: Contender, plain: Sequence[Arm]) -> str:
    """Where an arm is ahead: from some FLOPs on, in the seeds that end so; or else until when it was; or never."""
    each = [ahead_from(arm, base) for arm, base in zip(one.arms, plain, strict=True)]
    for place, (before, behind) in enumerate((("from", " on"), ("until", ""))):
        if known := [flops for found in each if (flops := found[place]) is not None]:
            return f"{before} {words.flops(spread(known)[0])}{behind} ({len(known)} of {len(each)})"
    return f"never (0 of {len(each)})"


def table(found: Frontier) -> str:
    """A row an arm: where it is ahead of plain training, and its gain at every horizon."""
    head = ["Arm", "Ahead of plain training", *(f"Gain at {words.flops(h)}" for h in found.horizons)]
    lines = [head, ["---"] * len(head)]
    for one in found.contenders:
        cells = [one.title, lead(one, found.plain)]
        for place, reached in enumerate(one.points):
            beside = "–" if reached is None else f"{gain(reached)}, {one.wins(place)} of {len(reached.gains)}"
            cells.append(beside)
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def sentences(found: Frontier) -> list[str]:
    """For each horizon, which arms with neither an external network nor guidance lead plain training in every seed."""
    own, count = [one for one in found.contenders if not (one.external or one.drawn_otherwise)], len(found.plain)
    told = []
    for place, horizon in enumerate(found.horizons):
        reached = [(one, at) for one in own if (at := one.points[place]) is not None]
        ahead = sorted(
            ((one, at) for one, at in reached if one.wins(place) == count), key=lambda pair: -mean_gain(pair[1])
        )
        if ahead:
            names = ", ".join(f"“{one.title}” ({gain(at)})" for one, at in ahead)
            told.append(
                f"At {words.flops(horizon)} {len(ahead)} of {len(reached)} arms without an external network or "
                f"guidance lead plain training in {count} of {count} seeds: {names}."
            )
        else:
            told.append(
                f"At {words.flops(horizon)} none of {len(reached)} arms without an external network or guidance leads "
                f"plain training in {count} of {count} seeds."
            )
    return told


RULES = (
    "Use: ahead in every seed at every budget",
    "For longer runs: ahead in every seed at the largest budget, and not at every smaller one",
    "For short runs: ahead in every seed at a smaller budget, and not at the largest",
    "Undecided: ahead in some seeds at the largest budget",
    "Not at this size: behind in every seed at the largest budget",
)
"""What an arm's seeds say of its use, best first."""


def rule(one: Contender) -> str:
    """Which of RULES an arm falls under."""
    everywhere = [one.wins(place) == len(one.arms) for place in range(len(one.points))]
    if everywhere[-1]:
        return RULES[0] if all(everywhere) else RULES[1]
    if any(everywhere):
        return RULES[2]
    return RULES[3] if one.wins(-1) else RULES[4]


def advice(found: Frontier) -> list[str]:
    """What the numbers say to use: a line for each rule that some arm falls under, with its gain at the end.

    Arms that are drawn with guidance have a line of their own: beside plain training without it they say what guidance
    does, not what training does.
    """
    lines = []
    if len(found.plain) == 1:
        lines.append("With one seed, chance can't be told from effect: further seeds have to confirm this list.")
    else:
        chance, compared = words.percent(0.5 ** len(found.plain)), len(found.contenders)
        lines.append(
            f"An arm that changes nothing is ahead in all {len(found.plain)} seeds with a chance of {chance}, and "
            f"{compared} arms are compared: take a gain near 1 for chance."
        )
    for words_of_rule in RULES:
        named = [
            f"{one.title} ({gain(last)}{', with an external network' * one.external})"
            for one in found.contenders
            if (last := one.points[-1]) is not None and not one.drawn_otherwise and rule(one) == words_of_rule
        ]
        if named:
            lines.append(f"{words_of_rule}: {', '.join(named)}.")
    scored = ((one, one.points[-1]) for one in found.contenders if one.drawn_otherwise)
    if otherwise := [f"{one.title} ({gain(last)})" for one, last in scored if last is not None]:
        lines.append(f"Drawn in another way, and so to be compared with one another alone: {', '.join(otherwise)}.")
    if unknown := [one.title for one in found.contenders if one.points[-1] is None]:
        lines.append(f"Not scored at the largest budget: {', '.join(unknown)}.")
    return lines


def section(frontiers: Sequence[Frontier], picture: str) -> str:
    """The page's section on all such studies."""
    parts = [
        "## Which arm leads at equal FLOPs?\n",
        "Every arm is read at several budgets, which hold what its training cost: heads, teachers and their forward "
        "passes, but not the training of an external network. The gain is plain training's Fréchet distance divided by "
        "the arm's at the same total FLOPs: above 1 the arm is ahead. Gains are geometric means over the seeds (lowest "
        "to highest), with the number of seeds ahead. “From”: the total FLOPs of the evaluation from which on every "
        "one beats plain training's at the same FLOPs. “Until”, where no seed ends with a lead: those of the last one "
        "that does. Both are means over the seeds that have one.\n",
    ]
    for one in frontiers:
        drawn = ", samples drawn without guidance" * (_drawing(one.plain[0])["cfg_scale"] == 1.0)
        parts += [
            f"{one.title}, {len(one.plain)} seed{'s' * (len(one.plain) != 1)}{drawn}:\n",
            "".join(f"- {line}\n" for line in sentences(one)),
            table(one),
            "**What we would use**, by these numbers and at this size alone:\n",
            "".join(f"- {line}\n" for line in advice(one)),
        ]
    return "\n".join(
        [*parts, f"![Gain over plain training by total FLOPs; the range over seeds is shaded]({picture})\n"]
    )


def draw(frontiers: Sequence[Frontier], path: Path) -> None:
    """The figure: a panel a kind of arm, IN_A_ROW beside one another."""
    panels = [chart for one in frontiers for chart in charts(one)]
    rows = [panels[n : n + IN_A_ROW] for n in range(0, len(panels), IN_A_ROW)]
    plot.save(plot.sheet(rows, 4.6, 3.6, common=False), path, dpi=110)
