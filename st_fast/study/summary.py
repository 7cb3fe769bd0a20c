"""What each stage costs and buys, a row a study: the first table of the page. Imports no torch."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from st_fast.report import words
from st_fast.report.arms import Arm
from st_fast.report.repeats import spread
from st_fast.study.seeds import METRIC, Seed, complete

HEAD = (
    "Study", "Seeds", "Stage 1 alone, at equal FLOPs", "Stage 2, at equal steps of the new model",
    "The same with a random network as teacher", "Stage 2, at equal FLOPs",
    "Of its FLOPs: teacher trained, teacher asked",
)  # fmt: skip


def section(folder: Path) -> str:
    """The table over all studies whose seeds' files lie in the folder, and how to read it; "" without any."""
    rows = [row for group in complete(folder).values() if (row := _row(group)) is not None]
    if not rows:
        return ""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return (
        f"{table}\nFréchet distance beside plain training's, mean ± standard deviation over the seeds: less is better. "
        "At equal FLOPs stage 2 has paid for its teacher, for its training and its forward passes. At equal steps, as "
        "in published curves, the teacher is free, and plain, stage 2 and the random teacher's student are read where "
        "the first of them ends; what a random teacher gives as well is not due to what a teacher has learnt. "
        "Stage 2 is here the arm that each study names as its reference. Studies differ in their budgets and in how "
        "samples are drawn: rows can't be compared with each other.\n"
    )


def _row(group: Sequence[tuple[dict[str, Any], Seed]]) -> list[str] | None:
    """None where a file doesn't say which arms to compare, or the reference has no teacher: then it is no stage 2."""
    told, seeds = group[0][0], [seed for _, seed in group]
    baseline, reference = str(told.get("baseline")), str(told.get("reference"))
    if any(name not in seed.arms for seed in seeds for name in (baseline, reference)):
        return None
    plain, taught = ([seed.arms[name] for seed in seeds] for name in (baseline, reference))
    if not any(arm.teacher.flops + arm.teacher_forward_flops for arm in taught):
        return None

    def beside_plain(kind: Callable[[Arm], bool], axis: str, *others: list[Arm]) -> str:
        name = next((name for name, arm in seeds[0].arms.items() if kind(arm)), None)
        found = [seed.arms[name] for seed in seeds if name in seed.arms]
        return relative(found, plain, axis, *others) if len(found) == len(plain) else "–"

    titles = {str(arm.get("name")): str(arm.get("title")) for arm in told["arms"]}
    spent = math.fsum(arm.total.flops for arm in taught)
    trained, asked = (
        words.percent(math.fsum(costs) / spent)
        for costs in ([arm.teacher.flops for arm in taught], [arm.teacher_forward_flops for arm in taught])
    )
    return [
        str(told.get("title")), str(len(seeds)), beside_plain(_is_stage_1, "flops"),
        f"{relative(taught, plain, 'step')} ({titles[reference]})", beside_plain(_has_random_teacher, "step", taught),
        relative(taught, plain, "flops"), f"{trained}, {asked}",
    ]  # fmt: skip


def _is_stage_1(arm: Arm) -> bool:
    return arm.stage.method == "velocity_head"


def _has_random_teacher(arm: Arm) -> bool:
    return arm.stage.method == "self_transcendence" and arm.teacher.flops == 0


def relative(ours: Sequence[Arm], theirs: Sequence[Arm], axis: str, *others: Sequence[Arm]) -> str:
    """“−3.2 % ± 1.1 %, better in 2 of 3”: ours beside theirs, a pair a seed, where the first of all these arms ends."""
    changes = []
    for arms in zip(ours, theirs, *others, strict=True):
        end = min(arm.quality(METRIC, axis)[0][-1] for arm in arms)
        first, second = (arm.at(METRIC, axis, end) for arm in arms[:2])
        changes.append(first / second - 1)
    mean, deviation = spread(changes)
    about = f" ± {words.percent(deviation)}" if math.isfinite(deviation) else ""
    better = sum(change < 0 for change in changes)
    return f"{'+' if mean > 0 else ''}{words.percent(mean)}{about}, better in {better} of {len(changes)}".replace(
        "-", "−"
    )
