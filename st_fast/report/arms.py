"""What is compared: one stage of one run, with everything that it cost, its teacher's training included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from st_fast.core.errors import UserError
from st_fast.report import words
from st_fast.report.collect import ModelKey, Record, RunLog, StageLog, finite, number, read_run
from st_fast.report.metrics import METRICS


@dataclass(frozen=True)
class Cost:
    """Training FLOPs and seconds; `known` is False where a part of them is recorded nowhere."""

    flops: float = 0.0
    seconds: float = 0.0
    known: bool = True

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds, self.known and other.known)

    def __str__(self) -> str:
        """“1.2 PFLOP and 3 min”, marked as a lower bound where a part isn't known."""
        return f"{'at least ' * (not self.known)}{words.flops(self.flops)} and {words.duration(self.seconds)}"


@dataclass(frozen=True)
class Arm:
    """One stage of one run. `own` is what it cost itself, the teacher's forward passes included; `teacher` is what
    training the models before it cost: its teacher, and what its weights began from.

    `colour` and `dash` are the same for an arm in every figure.
    """

    run: RunLog
    stage: StageLog
    label: str
    colour: int
    dash: int
    own: Cost
    teacher: Cost

    @property
    def total(self) -> Cost:
        """Its own cost and that of all models before it."""
        return self.own + self.teacher

    @property
    def teacher_forward_flops(self) -> float:
        """The part of `own` for the frozen teacher's forward passes, which end at the stage's `stop_step`, or sooner by
        themselves; those for comparing gradients are left out."""
        start, stop = self.stage.start, self.stage.entry.get("stop_step")
        if (ended := self.stage.stopped) is not None:
            stop = ended["step"]
        steps = min(self.stage.step, stop) if isinstance(stop, int) and stop > 0 else self.stage.step
        spent = steps * number(start, "batch_size") * number(start, "teacher_flops_per_image")
        return min(max(0.0, spent), self.own.flops) if math.isfinite(spent) else 0.0

    def quality(self, metric: str, axis: str) -> tuple[list[float], list[float]]:
        """Points (x, metric) of its evaluations; x counts "step", or total "flops" or "seconds", teacher included."""
        offset = {"step": 0.0, "flops": self.teacher.flops, "seconds": self.teacher.seconds}[axis]
        records = self.stage.evals
        return finite((number(record, axis) + offset, number(record["metrics"], metric)) for record in records)

    def last_sample(self, budget: float) -> list[Record]:
        """The record of the last sample drawn within a total of FLOPs; none where there is none."""
        left = budget * (1 + 1e-9) - self.teacher.flops
        return [record for record in self.stage.records["sample"] if number(record, "flops") <= left][-1:]

    def at(self, metric: str, axis: str, x: float) -> float:
        """The metric where an axis reaches x, on the straight line between the evaluations around it.

        A distance falls by about equal shares, not by equal amounts, so the line is drawn between its logarithms, where
        both are above zero. The last one's value after it; NaN if nothing had been evaluated by then.
        """
        places, values = self.quality(metric, axis)
        if not places or not x >= places[0] * (1 - 1e-9):
            return math.nan
        place = float(np.interp(x, places, range(len(places))))
        before, share = int(place), place % 1
        if not share:
            return values[before]
        first, second = values[before : before + 2]
        if METRICS[metric].lower_is_better and min(first, second) > 0:
            return float(first * (second / first) ** share)
        return first + share * (second - first)

    @property
    def last_metrics(self) -> Record:
        """What its last evaluation measured; empty where there is none."""
        return self.stage.evals[-1]["metrics"] if self.stage.evals else {}

    def final(self, metric: str) -> float:
        """The last evaluation's value of a metric; NaN where there is none."""
        return number(self.last_metrics, metric)


def make_arms(runs: Sequence[RunLog]) -> list[Arm]:
    """Every stage of every run, in order. One run: a colour a stage. Several: a colour a run, earlier stages dashed."""
    arms = []
    for r, run in enumerate(runs):
        for s, stage in enumerate(run.stages):
            if len(runs) == 1:
                label, colour, dash = stage.name, s, 0
            else:
                label = run.name if len(run.stages) == 1 else f"{run.name} · {stage.name}"
                colour, dash = r, len(run.stages) - 1 - s
            own = Cost(stage.last("flops"), stage.last("seconds"))
            arms.append(Arm(run, stage, label, colour, dash, own, sum(_before(run, stage).values(), Cost())))
    return arms


def _before(run: RunLog, stage: StageLog) -> dict[tuple[Path | str, ...], Cost]:
    """What each model before this stage cost, by where it is: its teacher, what its weights began from, and theirs.

    Such a model is an earlier stage of the same run, or a path into another run's folder. Its log is read up to the
    step at which it was taken. One from outside without a log has a cost that isn't known.
    """
    found: dict[tuple[Path | str, ...], Cost] = {}
    earlier = run.stages[: run.stages.index(stage)]
    for kind in get_args(ModelKey):
        name, step = stage.model(kind), stage.model_step(kind)
        if name is None:
            continue
        other = next((other for other in earlier if other.name == name), None)
        if other is not None:
            models = {(run.path.resolve(), other.name): _spent(other, step)} | _before(run, other)
        else:
            models = _outside(run, name, step)
        for key, cost in models.items():  # of two checkpoints of one stage the later one's cost holds both
            found[key] = max(cost, found.get(key, cost), key=lambda c: c.flops)
    return found


def _spent(stage: StageLog, step: int | None) -> Cost:
    """What a stage had cost by a step, or in all; not known where it has made steps and the log doesn't tell."""
    limit = stage.step if step is None else step
    flops = stage.last("flops", limit)
    return Cost(flops, stage.last("seconds", limit), flops > 0 or not limit)


def _outside(run: RunLog, model: str, step: int | None) -> dict[tuple[Path | str, ...], Cost]:
    """A model at a path such as runs/other/align/checkpoints/00200000 and those before it, from its run's log.

    `step` is the one at which it was taken, where the path doesn't say.
    """
    unknown: dict[tuple[Path | str, ...], Cost] = {(model,): Cost(known=False)}
    for base in (Path.cwd(), run.path, run.path.parent):
        path = base / model
        try:
            folder = next((p for p in (path, *path.parents) if (p / "log.jsonl").is_file()), None)
            if folder is None or folder == run.path:
                continue
            other = read_run(folder)
        except (UserError, OSError):  # the name may be none that a file can have
            return unknown
        parts = path.relative_to(folder).parts
        stage = next((s for s in other.stages if s.name == parts[0]), None) if parts else other.stages[-1]
        if stage is None:
            return unknown
        taken = int(parts[-1]) if len(parts) > 1 and parts[-1].isdecimal() else step
        return {(folder.resolve(), stage.name): _spent(stage, taken)} | _before(other, stage)
    return unknown
