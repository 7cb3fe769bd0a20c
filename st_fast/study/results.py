"""What came out of a study, from its runs' logs: curves, scores and the verdict, by arm and seed. Imports no torch."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError
from st_fast.report.arms import Arm, make_arms
from st_fast.report.collect import read_run
from st_fast.report.fairness import data_digest, unfair
from st_fast.report.repeats import Repeats, Row, rows
from st_fast.study.plan import Study, jobs

METRIC = "frechet"
PROTOCOL = (
    "num", "cfg_scale", "sampler", "steps", "classifier_accuracy", "classifier_digest", "floor_frechet", "floor_num"
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """A finished study: each arm's runs by seed, and the verdict's rows, the baseline first."""

    study: Study
    groups: list[Repeats]
    rows: list[Row]

    @property
    def protocol(self) -> dict[str, Any]:
        """How every score was taken, from the first evaluation."""
        arm = next(iter(self.groups[0].by_seed.values()))
        metrics = arm.stage.evals[-1]["metrics"]
        return {key: metrics[key] for key in PROTOCOL if key in metrics}

    def group(self, name: str) -> Repeats:
        """An arm's runs."""
        titles = {arm.name: arm.title for arm in self.study.arms}
        return next(group for group in self.groups if group.label == titles[name])


def collect(study: Study, out: Path) -> Results:
    """Reads every arm's run of every seed; UserError for one that is missing, unscored, or that can't be compared."""
    groups = [Repeats(arm.title, {}) for arm in study.arms]
    logs = []
    for job in jobs(study, out):
        if job.arm is None:
            continue
        log = read_run(job.folder)
        logs.append(log)
        arm = make_arms([log])[-1]
        if not math.isfinite(arm.final(METRIC)) or arm.stage.step < job.recipe.stages[0].steps:
            raise UserError(f"{job.folder}: not finished and scored yet; run the study first")
        if not arm.total.known:
            raise UserError(f"{job.folder}: no log says what its teacher cost; start the study where it was started")
        groups[study.arms.index(job.arm)].by_seed[job.seed] = arm
    reasons = unfair(logs, seeds_declared=True)
    if reasons:
        raise UserError(f"{out}: these runs can't be compared: {'; '.join(reasons)}")
    baseline = next(g for g, arm in zip(groups, study.arms, strict=True) if arm.name == study.baseline)
    return Results(study, groups, rows(groups, baseline, METRIC))


def as_json(results: Results) -> dict[str, Any]:
    """Everything the page is written from. Only `wall_clock` differs between two machines or two days."""
    study = results.study
    named = {arm.title: arm for arm in study.arms}
    first = next(iter(results.groups[0].by_seed.values()))
    return {
        "study": study.name,
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "metric": METRIC,
        "dataset": data_digest(first.run),
        "protocol": results.protocol,
        "verdict": [{k: v for k, v in asdict(row).items() if k != "reached_seconds"} for row in results.rows],
        "arms": [
            {"name": named[g.label].name, "title": g.label, "runs": [_run(s, a) for s, a in g.by_seed.items()]}
            for g in results.groups
        ],
        "wall_clock": {
            "reached": {row.label: row.reached_seconds for row in results.rows},
            "seconds": {g.label: [a.own.seconds for a in g.by_seed.values()] for g in results.groups},
            "device": str(first.stage.start.get("device", "")),
            "versions": first.stage.start.get("versions", {}),
        },
    }


def _run(seed: int, arm: Arm) -> dict[str, Any]:
    flops, frechet = arm.quality(METRIC, "flops")
    steps, accuracy = arm.quality("accuracy", "step")
    return {
        "seed": seed,
        "step": [int(step) for step in steps],
        "total_flops": flops,
        "frechet": frechet,
        "accuracy": accuracy,
        "own_flops": arm.own.flops,
        "teacher_flops": arm.teacher.flops,
        "teacher_forward_flops": arm.teacher_forward_flops,
    }
