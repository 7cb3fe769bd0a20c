"""What came out of a study: its complete seeds put together, and every comparison as words. Imports no torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from st_fast.report import words
from st_fast.report.collect import number
from st_fast.report.metrics import METRICS
from st_fast.report.repeats import Repeats, Row, rows, spread
from st_fast.study.plan import Arm as ArmPlan
from st_fast.study.plan import Study
from st_fast.study.seeds import METRIC, PROTOCOL, Seed


@dataclass(frozen=True)
class Results:
    """A study's complete seeds: each arm's runs, and the verdict's rows, the baseline first; and its other seeds."""

    study: Study
    groups: list[Repeats]
    rows: list[Row]
    unfinished: list[Seed]

    @property
    def protocol(self) -> dict[str, Any]:
        """How every score was taken, from the first evaluation."""
        metrics = next(iter(self.groups[0].by_seed.values())).last_metrics
        return {key: metrics[key] for key in PROTOCOL if key in metrics}

    @property
    def seeds(self) -> list[int]:
        """The complete ones."""
        return sorted(self.groups[0].by_seed) if self.groups else []

    def group(self, name: str) -> Repeats:
        """An arm's runs."""
        return next(group for group, arm in zip(self.groups, self.study.arms, strict=True) if arm.name == name)


def together(study: Study, seeds: Sequence[Seed]) -> Results:
    """The seeds' runs by arm. A seed that lacks an arm is set apart: it is in no mean."""
    names = {arm.name for arm in study.arms}
    complete = [seed for seed in seeds if names <= set(seed.arms)]
    unfinished = [seed for seed in seeds if seed not in complete]
    if not complete:
        return Results(study, [], [], unfinished)
    groups = [Repeats(arm.title, {seed.seed: seed.arms[arm.name] for seed in complete}) for arm in study.arms]
    baseline = next(g for g, arm in zip(groups, study.arms, strict=True) if arm.name == study.baseline)
    return Results(study, groups, rows(groups, baseline, METRIC), unfinished)


def comparisons(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """(arm, its difference to the baseline at equal FLOPs and at equal steps, to the reference at equal steps).

    Of every arm but the baseline, best first at equal FLOPs. Steps are those of the new model alone, as published
    curves count. The reference is compared with the other arms that have a teacher.
    """
    study, rows_of = results.study, {row.label: row for row in results.rows}
    base = study.arm(study.baseline).title
    for row in sorted(rows_of.values(), key=lambda row: spread(row.at_cost)[0]):
        arm = next(arm for arm in study.arms if arm.title == row.label)
        if row.label == base:
            continue
        flops, steps = (_at_equal(axis, results, arm.name, study.baseline) for axis in ("flops", "step"))
        beside = arm.teacher is not None and arm.name != study.reference
        yield row.label, flops, steps, _at_equal("step", results, arm.name, study.reference) if beside else "–"


def _at_equal(axis: Literal["flops", "step"], results: Results, ours: str, theirs: str) -> str:
    """The difference of two arms where the first of them ends, by total FLOPs or by steps of the new model."""
    mine, other = results.group(ours).by_seed, results.group(theirs).by_seed
    pairs = [(mine[seed], other[seed]) for seed in results.seeds]
    ends = [min(arm.quality(METRIC, axis)[0][-1] for arm in pair) for pair in pairs]
    values = [[arm.at(METRIC, axis, end) for arm, end in zip(arms, ends, strict=True)]
              for arms in zip(*pairs, strict=True)]  # fmt: skip
    return difference(*values)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """“0.11 ± 0.02 lower (better), 3 of 3” of two lists with an entry a seed, lower being better; “–” of none."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = spread(differences)
    if not math.isfinite(mean):
        return "–"
    about = f" ± {words.plain(deviation)}" if math.isfinite(deviation) else ""
    side = "lower (better)" if mean < 0 else "higher (worse)" if mean > 0 else "of difference"
    agreeing = sum(d < 0 if mean < 0 else d > 0 for d in differences)
    return f"{words.plain(abs(mean))}{about} {side}, {agreeing} of {len(differences)}"


def is_control(arm: ArmPlan) -> bool:
    """Whether its teacher knows less than one that was trained on the true labels, or nothing."""
    return arm.teacher is not None and not (arm.teacher.trained and arm.teacher.labels == "true")


def equal_steps(results: Results) -> str:
    """The reference arm beside plain training after as many steps of the new model, and the controls beside it."""
    study = results.study
    taught, base = study.arm(study.reference), study.arm(study.baseline)
    first = f"“{taught.title}” beside “{base.title}”: {_at_equal('step', results, taught.name, base.name)}"
    beside = [f"“{arm.title}” {_at_equal('step', results, arm.name, taught.name)}"
              for arm in study.arms if is_control(arm)]  # fmt: skip
    if not beside:
        return f"{first}."
    return (
        f"{first}. Controls, whose teachers know less or nothing, beside “{taught.title}”: {'; '.join(beside)}. What a "
        "control gains as well is not due to what the teacher knows."
    )


def price(results: Results) -> str:
    """What of the reference arm's FLOPs its teacher took."""
    group = results.group(results.study.reference)
    runs = group.by_seed.values()
    total, training = math.fsum(arm.total.flops for arm in runs), math.fsum(arm.teacher.flops for arm in runs)
    asking = math.fsum(arm.teacher_forward_flops for arm in runs)
    return (
        f"{words.percent(training / total)} of the FLOPs of “{group.label}” trained its teacher, and "
        f"{words.percent(asking / total)} were the teacher's forward passes."
    )


def certainty(results: Results) -> str:
    """How often chance alone would give such agreement, and how much the scores vary by themselves."""
    base: Row = results.rows[0]
    n, arms = len(base.seeds), len(results.rows) - 1
    if n == 1:
        return "none: with one seed, chance can't be told from effect."
    return (
        f"the seed alone moves the score of “{base.label}” by ± {words.plain(spread(base.final)[1])}. By chance all "
        f"{n} seeds agree on a sign in {words.percent(2.0 ** (1 - n))} of comparisons, and {arms} arms are compared: "
        "trust a difference that is several times its ±, not one that is only the best of many. Held-out real images "
        f"score {words.plain(number(results.protocol, METRICS[METRIC].floor))}: differences near that say "
        "little, and less than that would be copies of training images, with which scores compare."
    )


def half_done(results: Results) -> list[str]:
    """A sentence for each seed that is not complete."""
    titles = {arm.name: arm.title for arm in results.study.arms}
    sentences = []
    for seed in results.unfinished:
        lacking = ", ".join(f"“{titles[name]}”" for name in titles if name not in seed.arms)
        have = len(titles.keys() & seed.arms)
        sentences.append(
            f"**Seed {seed.seed} is half done** ({have} of {len(titles)} arms; {lacking} left) and is in no "
            "figure or mean below."
        )
    return sentences
