"""What a study says to somebody who has never seen the paper: what each stage bought, at what cost, how surely."""

from __future__ import annotations

import math
from collections.abc import Sequence

from st_fast.report import arms as trained
from st_fast.report import words
from st_fast.report.repeats import Row, spread
from st_fast.report.verdict_table import reach, told
from st_fast.study.plan import Arm
from st_fast.study.results import METRIC, Results


def in_short(results: Results) -> list[str]:
    """A paragraph each on stage 1, stage 2, steps, price, controls and certainty, from the verdict's rows."""
    study, rows = results.study, {row.label: row for row in results.rows}
    arms = {arm.name: arm for arm in study.arms}
    base, taught = rows[arms[study.baseline].title], rows[arms[study.reference].title]
    alone = next((rows[arm.title] for arm in study.arms if _is_stage_1(arm)), None)
    said = []
    if alone is not None:
        said.append(
            f"**Stage 1 bought:** for the same FLOPs “{alone.label}” scores {told(alone.at_cost, words.plain)} and "
            f"“{base.label}” {told(base.final, words.plain)}: "
            f"{difference(alone.at_cost, base.final, base.label)}."
        )
    bought = (
        f"**Stage 2 bought:** “{taught.label}” scores {told(taught.at_cost, words.plain)} for the same FLOPs, its "
        f"teacher's training among them: {difference(taught.at_cost, base.final, base.label)}"
    )
    if alone is not None:
        bought += f"; {difference(taught.at_cost, alone.at_cost, alone.label)}"
    said += [f"{bought}.", by_steps(results, base, taught), price(results, base, taught)]
    controls = [arm for arm in study.arms if _is_control(results, arm)]
    if controls:
        said.append(_controls([rows[arm.title] for arm in controls], base, taught))
    said.append(certainty(results, base))
    return said


def _is_stage_1(arm: Arm) -> bool:
    return arm.teacher is None and arm.stage.get("supervision") == "velocity_head"


def _is_control(results: Results, arm: Arm) -> bool:
    """Whether its teacher can't know what a true one knows."""
    if arm.teacher is None:
        return False
    teacher = results.study.teacher(arm.teacher)
    return not teacher.trained or teacher.labels == "shuffled"


def difference(ours: Sequence[float], theirs: Sequence[float], other: str) -> str:
    """“0.11 ± 0.02 lower (better) than “plain”, in 3 of 3 seeds”: of two lists with an entry a seed."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = spread(differences)
    about = f" ± {words.plain(deviation)}" if math.isfinite(deviation) else ""
    side, agreeing = ("lower (better)", [d < 0 for d in differences]) if mean < 0 else (
        "higher (worse)", [d > 0 for d in differences]
    )  # fmt: skip
    return f"{words.plain(abs(mean))}{about} {side} than “{other}”, in {sum(agreeing)} of {len(differences)} seeds"


def by_steps(results: Results, base: Row, taught: Row) -> str:
    """The published way of counting: the baseline when it had taken as many steps as the student."""
    students = results.group(results.study.reference).by_seed
    plain = results.group(results.study.baseline).by_seed
    then = [at_step(plain[seed], students[seed].stage.step) for seed in taught.seeds]
    steps = words.count(students[taught.seeds[0]].stage.step)
    return (
        f"**Counted in steps of the new model alone,** as published curves count: after {steps} steps “{taught.label}” "
        f"scores {told(taught.final, words.plain)} and “{base.label}” {told(then, words.plain)}: "
        f"{difference(taught.final, then, base.label)}."
    )


def at_step(arm: trained.Arm, step: int) -> float:
    """The score after that many steps, on the straight line between the evaluations around it; NaN outside them."""
    steps, scores = arm.quality(METRIC, "step")
    for i, (x, y) in enumerate(zip(steps, scores, strict=True)):
        if x >= step:
            if x == step or i == 0:
                return y if x == step else math.nan
            return scores[i - 1] + (step - steps[i - 1]) / (x - steps[i - 1]) * (y - scores[i - 1])
    return math.nan


def price(results: Results, base: Row, taught: Row) -> str:
    """What of the second stage's FLOPs went where, and when it had what plain training ends with."""
    runs = list(results.group(results.study.reference).by_seed.values())
    total = math.fsum(arm.total.flops for arm in runs)
    training = math.fsum(arm.teacher.flops for arm in runs) / total
    asking = math.fsum(arm.teacher_forward_flops for arm in runs) / total
    return (
        f"**The price:** {words.percent(training)} of the FLOPs of “{taught.label}” trained its teacher and "
        f"{words.percent(asking)} asked it; in all it took {words.percent(spread(taught.cost_share)[0])} of what "
        f"“{base.label}” took. It had the final score of “{base.label}” after this share of that run's FLOPs: "
        f"{reach(taught)}."
    )


def _controls(controls: Sequence[Row], base: Row, taught: Row) -> str:
    told_of = "; ".join(
        f"“{row.label}” ends {difference(row.final, taught.final, taught.label)} after as many steps, and for the same "
        f"FLOPs is {difference(row.at_cost, base.final, base.label)}"
        for row in controls
    )
    return f"**Is it what the teacher knows?** Controls, whose teachers know less or nothing: {told_of}."


def certainty(results: Results, base: Row) -> str:
    """How often chance alone would give such agreement, and how much the scores vary by themselves."""
    n, arms = len(base.seeds), len(results.rows) - 1
    if n == 1:
        return "**How sure:** not at all: one seed, so chance can't be told from effect."
    floor = results.protocol.get("floor_frechet")
    real = (
        f" Real held-out images score {words.plain(floor)}; nobody can be much better than that."
        if isinstance(floor, (int, float))
        else ""
    )
    return (
        f"**How sure:** {n} seeds, which alone move the score of “{base.label}” by ± "
        f"{words.plain(spread(base.final)[1])}. By chance alone all {n} agree on a sign in "
        f"{words.percent(2.0 ** (1 - n))} of comparisons, and {arms} arms are compared: believe a difference that is "
        f"several times its ±, not one that is only the best of many.{real}"
    )
