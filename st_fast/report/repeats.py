"""The verdict: what each arm reaches over its seeds, at what share of a baseline's cost, as a table and a sentence.

Every comparison is between runs of one seed, which saw the same samples and noise; then the seeds are put together.
All costs count the teacher's training and its forward passes.
"""

import math
import re
import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.collect import Record
from st_fast.report.fairness import seed_of
from st_fast.report.metrics import METRICS, RANKING, Metric, summary

UNEVEN = 2.0
"""Times of one training over several seeds that lie further apart are the machine's other work, and left out."""


@dataclass(frozen=True)
class Repeats:
    """One arm's runs, by seed."""

    label: str
    by_seed: dict[int, Arm]


@dataclass(frozen=True)
class Row:
    """One arm beside the baseline; every list has an entry a seed, in `seeds`' order.

    `at_cost` is the metric at the baseline's total FLOPs of that seed, or at the last evaluation of an arm that took
    less; `cost_share` its total FLOPs as a share of the baseline's. `reached…` is the share of the baseline's FLOPs,
    steps (counting the arm's own alone) and seconds after which its final score was first reached; None: never.
    `better` counts the seeds in which `at_cost` is better than the baseline's final score. `seconds`: all it took.
    """

    label: str
    seeds: list[int]
    final: list[float]
    at_cost: list[float]
    accuracy_at_cost: list[float]
    cost_share: list[float]
    reached: list[float | None]
    reached_steps: list[float | None]
    reached_seconds: list[float | None]
    better: int
    seconds: list[float]


@dataclass(frozen=True)
class Verdict:
    """What came out in one sentence, and a table where there is something to compare; `note` says how to read it."""

    sentence: str
    head: list[str] = field(default_factory=list)
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown; "" without one."""
        lines = [self.head, ["---"] * len(self.head), *self.lines] if self.lines else []
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def group_by_seed(arms: Sequence[Arm]) -> list[Repeats]:
    """Arms whose runs differ in nothing but the seed and in where they lie, together; a seed's second run is apart.

    Several runs go under their stage's name, where no other group has it; a single one under its own.
    """
    groups: dict[tuple[str, int], Repeats] = {}
    for arm in arms:
        seed = seed_of(arm.run)
        key, copy = str(_without_seed(arm.run.recipe, seed)) + arm.stage.name, 0
        while seed in groups.setdefault((key, copy), Repeats(arm.label, {})).by_seed:
            copy += 1
        groups[key, copy].by_seed[seed] = arm
    stages = [next(iter(group.by_seed.values())).stage.name for group in groups.values()]
    return [
        Repeats(stage, group.by_seed) if len(group.by_seed) > 1 and stages.count(stage) == 1 else group
        for stage, group in zip(stages, groups.values(), strict=True)
    ]


def _without_seed(recipe: Record, seed: int) -> Record:
    """A recipe less its seed, its folder, and the seed in the paths of outside models: runs/seed0/teacher/align."""
    its_seed = re.compile(rf"seed[-_]?{seed}(?!\d)")
    run = {k: v for k, v in recipe.get("run", {}).items() if k not in ("seed", "out")}
    stages = [
        stage | {key: its_seed.sub("seed", str(stage[key])) for key in ("teacher", "init") if key in stage}
        for stage in recipe.get("stage", [])
    ]
    return {**recipe, "run": run, "stage": stages}


def heads(arms: Sequence[Arm]) -> list[Arm]:
    """What each run is ranked by: its last stage that was evaluated; its last stage where none was."""
    last: dict[str, Arm] = {}
    for arm in arms:
        before = last.get(arm.run.name)
        if before is None or arm.stage.evals or not before.stage.evals:
            last[arm.run.name] = arm
    return list(last.values())


def ranked(arms: Sequence[Arm]) -> tuple[Metric, list[Arm]]:
    """The metric that decides and the heads that have it, best first: the first of RANKING that all of them have."""
    evaluated = [arm for arm in heads(arms) if arm.stage.evals]
    shared = (m for m in RANKING if all(math.isfinite(arm.final(m.key)) for arm in evaluated))
    metric = next(shared, RANKING[-1])
    known = [arm for arm in evaluated if math.isfinite(arm.final(metric.key))]
    return metric, sorted(known, key=lambda arm: -metric.sign * arm.final(metric.key))


def verdict(arms: Sequence[Arm], unfair: Sequence[str] = ()) -> Verdict:
    """What came out, computed from the logs. Nothing is ranked where `unfair` gives reasons why it can't be."""
    metric, best = ranked(arms)
    if unfair:
        return Verdict(f"These runs can't be ranked: {'; '.join(unfair)}.")
    if not best:
        states = [f"“{a.label}” is at step {words.count(a.stage.step)} of {words.count(a.stage.steps)}, for {a.total}"
                  for a in heads(arms)]  # fmt: skip
        return Verdict(f"No samples were scored, so nothing can be said of quality: {'; '.join(states)}.")
    if len(best) == 1:
        return Verdict(_alone(best[0]))
    groups = group_by_seed(heads(arms))
    if len(groups) == 1:
        score = told([arm.final(metric.key) for arm in best], metric)
        reached = f"“{groups[0].label}” reaches {metric.title} {score} over {len(best)} seeds"
        return Verdict(f"{reached}; there is nothing to compare it with.")
    baseline = choose_baseline(groups, best)
    found = rows(groups, baseline, metric.key)
    if len(found) < 2 or found[0].label != baseline.label:
        others = "; ".join(f"“{arm.label}”: {summary(arm.last_metrics, False)}" for arm in best[1:4])
        costs = "" if all(arm.total.known for arm in best) else (
            "; as the cost of a model before one of them isn't recorded, they can't be compared at equal cost"
        )  # fmt: skip
        return Verdict(f"“{best[0].label}” ends best with {summary(best[0].last_metrics)}, against {others}{costs}.")
    made, compared_with = compared(found, metric.key), [row.label for row in found]
    left_out = ", ".join(f"“{group.label}”" for group in groups if group.label not in compared_with)
    note = f" Left out, as their score or their cost isn't recorded: {left_out}." if left_out else ""
    return replace(made, note=made.note + note)


def _alone(arm: Arm) -> str:
    """What a single scored run reached, at what cost."""
    share = arm.teacher.flops + arm.teacher_forward_flops
    teacher = ""
    if arm.stage.model("teacher") is None and arm.stage.model("init") is None:
        teacher = ", without a teacher"
    elif arm.teacher.known and arm.total.flops > 0:
        models = (
            "training and forward passes of its teacher" if arm.stage.model("init") is None else "the models before it"
        )
        teacher = f", {words.percent(share / arm.total.flops)} of the FLOPs for {models}"
    return (
        f"“{arm.label}” reaches {summary(arm.last_metrics)} after {words.count(arm.stage.evals[-1]['step'])} steps, "
        f"for {arm.total}{teacher}; this is a single seed."
    )


def choose_baseline(groups: Sequence[Repeats], best: Sequence[Arm]) -> Repeats:
    """The first evaluated arm of plain training; where there is none, the one that ends second best."""
    plain = [g for g in groups if all(a.stage.plain and a.stage.evals for a in g.by_seed.values())]
    by_rank = [group for arm in best for group in groups if arm in group.by_seed.values()]
    return [*plain, *(group for group in by_rank if group is not by_rank[0]), *by_rank][0]


def rows(groups: Sequence[Repeats], baseline: Repeats, metric: str) -> list[Row]:
    """A row for each arm that was evaluated, the baseline first; seeds that the baseline lacks are left out."""
    ordered = [baseline, *(group for group in groups if group is not baseline)]
    return [row for group in ordered if (row := _row(group, baseline, METRICS[metric])).seeds]


def _row(group: Repeats, baseline: Repeats, metric: Metric) -> Row:
    pairs = {
        seed: (arm, base)
        for seed, arm in sorted(group.by_seed.items())
        if (base := baseline.by_seed.get(seed)) and base.total.flops > 0 and math.isfinite(base.final(metric.key))
        and arm.quality(metric.key, "flops")[0] and arm.total.known
    }  # fmt: skip
    both = pairs.values()
    at_cost = [arm.at(metric.key, "flops", base.total.flops) for arm, base in both]
    flops, steps, seconds = ([_first(*pair, metric, axis) for pair in both] for axis in ("flops", "step", "seconds"))
    return Row(
        group.label,
        list(pairs),
        [arm.quality(metric.key, "flops")[1][-1] for arm, _ in both],
        at_cost,
        [arm.at("accuracy", "flops", base.total.flops) for arm, base in both],
        [arm.total.flops / base.total.flops for arm, base in both],
        flops,
        steps,
        seconds,
        sum(metric.sign * (ours - base.final(metric.key)) > 0 for ours, (_, base) in zip(at_cost, both, strict=True)),
        [arm.total.seconds for arm, _ in both],
    )


def _first(arm: Arm, base: Arm, metric: Metric, axis: str) -> float | None:
    """Where on an axis the arm first scored as well as the baseline at its end, as a share of the baseline's."""
    whole = {"flops": base.total.flops, "step": base.stage.step, "seconds": base.total.seconds}[axis]
    points = zip(*arm.quality(metric.key, axis), strict=True)
    first = next((x for x, y in points if metric.sign * (y - base.final(metric.key)) >= 0), None)
    return None if first is None or whole <= 0 else first / whole


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for one value, both for none."""
    known = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def compared(found: Sequence[Row], key: str, apart: Container[str] = ()) -> Verdict:
    """The rows, the baseline's first, in words: the best arm beside the baseline, and a table of all.

    apart: arms that stand in the table alone, after the others, if there are others.
    """
    base, others, metric = found[0], found[1:], METRICS[key]
    least, most = min(base.seconds), max(base.seconds)
    timed = most <= UNEVEN * least
    head = ["Arm", f"{metric.title} at equal cost", "Accuracy at equal cost", "Better", f"Final {metric.title}"]
    head += [f"FLOPs / “{base.label}”", "Its final score after: of its FLOPs", "of its steps"]
    head += ["of its time"] * timed
    eligible = [row for row in others if row.label not in apart] or others
    lines = []
    for row in (base, *eligible, *(row for row in others if row not in eligible)):
        better = "" if row is base else f"{row.better} of {len(row.seeds)}"
        cells = [row.label, told(row.at_cost, metric), told(row.accuracy_at_cost, METRICS["accuracy"]), better]
        cells += [told(row.final, metric), words.percent(spread(row.cost_share)[0])]
        lines.append([*cells, *map(reach, (row.reached, row.reached_steps, *[row.reached_seconds] * timed))])
    note = (
        "Mean ± standard deviation over the seeds; each run is compared with the baseline of its own seed. “At equal "
        f"cost”: at the FLOPs that “{base.label}” took in all, teachers included, interpolated between evaluations; an "
        f"arm that took less ends earlier. “Better”: in how many seeds that beats the final score of “{base.label}”. "
        "“Its final score after”: the first evaluation with a score that good, as a share of the baseline's FLOPs, of "
        f"its steps (the arm's own alone){', and of its time' * timed}: mean of the seeds that have one (lowest to "
        f"highest). Scores are noisy, so “{base.label}” itself may reach its own before its end."
    )
    if not timed:
        note += (
            f" Times are left out: “{base.label}” took {words.duration(least)} with one seed and "
            f"{words.duration(most)} with another, so they tell of the machine."
        )
    best = max(eligible, key=lambda row: metric.sign * spread(row.at_cost)[0])
    n, score, goal = len(best.seeds), told(best.at_cost, metric), told(base.final, metric)
    seeds = f"Over {n} seeds" if n > 1 else "With one seed, which can't tell chance from effect"
    if metric.sign * (spread(best.at_cost)[0] - spread(base.final)[0]) > 0:
        first = f"“{best.label}” is best at the cost of “{base.label}”: {metric.title} {score} against {goal}"
    else:
        first = f"no arm beats “{base.label}” ({metric.title} {goal}) at its cost; the next is “{best.label}” ({score}"
        first += ")"
    when = "never reaches that final score"
    if any(share is not None for share in best.reached):
        steps, seconds = (reach(shares).split(" (")[0] for shares in (best.reached_steps, best.reached_seconds))
        when = f"reaches that final score after {reach(best.reached)} of the baseline's FLOPs"
        when += f", {steps} of its steps and {seconds} of its time" if timed else f" and {steps} of its steps"
    sentence = f"{seeds}, {first}, better in {best.better} of {n}; teachers included, it {when}."
    return Verdict(sentence, head, lines, note)


def told(values: Sequence[float], metric: Metric) -> str:
    """“4.2 ± 0.3”; the mean alone for one value."""
    mean, deviation = spread(values)
    return f"{metric.write(mean)} ± {metric.write(deviation)}" if math.isfinite(deviation) else metric.write(mean)


def reach(values: Sequence[float | None]) -> str:
    """“62.0 % (58.1 % to 66.4 %; 3 of 3)”, or that it never does; one seed's share alone."""
    shares = [share for share in values if share is not None]
    if not shares:
        return f"never (0 of {len(values)})"
    span = f"{words.percent(min(shares))} to {words.percent(max(shares))}; " if len(shares) > 1 else ""
    counts = f" ({span}{len(shares)} of {len(values)})" if len(values) > 1 else ""
    return f"{words.percent(spread(shares)[0])}{counts}"
