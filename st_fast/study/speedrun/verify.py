"""Whether a record is true: what `record.check` says of it, and one seed run again with the code of its revision.

On the same kind of machine with the same versions every bit has to be the same; elsewhere the seed's score has to be
where one more score of the record's kind lies.
"""

import re
import secrets
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from st_fast.core.comparison import differences
from st_fast.core.errors import RunFailed, Say, UserError, shown
from st_fast.core.records import log_records
from st_fast.study.speedrun import record as records
from st_fast.study.speedrun.attempt import Attempt, read_attempt, score_of
from st_fast.study.speedrun.origin import Code, check_revision, run_in, tree_of
from st_fast.study.speedrun.record import CHANGES, RECIPE, Record
from st_fast.study.speedrun.task import CONFIDENCE, Task, interval, read_task, task_names

JUDGE = re.compile(r"^(?:---|\+\+\+) [ab]/(st_fast/(?:study/speedrun|evaluate)/\S*)", re.M)
"""In a diff: a file of what scores."""
SLOWER = 1.25
"""Times of a seed's training here and in the record that differ by more are told to be unconfirmed."""
NAMED = 5
"""Differences that a line names at most."""
MEASURED = ("loss", "denoise", "aux", "grad_norm", "lr", "skipped", "flops")
"""Of a log's records: what the same bits make the same."""


def verify(
    folder: Path, task_name: str | None, seed: int | None, data: Path, images: Path | None, run_changes: bool,
    rerun: bool, say: Say,
) -> None:  # fmt: skip
    """Checks the record in `folder` and tells each thing it found true; UserError or RunFailed at the first that isn't.

    task_name: where its task is, if it is none of this repository; seed: which one is run again (None: drawn now, so
    that nobody knew it); images: of a task that brings none; run_changes: whether a diff that came with the record may
    be run here; rerun: False checks all that needs no training.
    """
    found = records.read_record(folder)
    say(f"files: all as they were written ({records.identity(folder)})")
    if task_name is None and found.task not in task_names():
        raise UserError(
            f"{folder}: task {shown(found.task)}: st_fast has no task of that name; --task names its folder"
        )
    task = read_task(task_name or found.task)
    recipe = records.check(folder, found, task)
    say(f"figures: logs, costs and verdict fit together: {found.mean:.4g} on average, {found.verdict}")
    code = Code(found.revision, records.changes(folder))
    check_revision(code.revision)
    if not rerun:
        say("not run again (--no-rerun): that its figures are those of its recipe and code, this does not say")
        return
    if touched := JUDGE.search(code.changes):
        raise UserError(f"{folder / CHANGES}: changes {touched[1]}, which judges; a change of that is no record's")
    if code.changes and not run_changes:
        raise UserError(
            f"{folder / CHANGES}: code of the record's author, which would run here; read it, then --run-changes"
        )
    seed = secrets.choice(task.seeds) if seed is None else seed
    if seed not in task.seeds:
        raise UserError(f"--seed {seed}: the task has {', '.join(map(str, task.seeds))}")
    say(f"seed {seed}: running it again, {recipe.stages[-1].steps} steps of its last stage")
    with tree_of(code) as tree, tempfile.TemporaryDirectory(prefix="st_fast-speedrun-") as place:
        out = Path(place) / f"seed{seed}"
        flags = ["--seed", str(seed), "--data", str(data.resolve()), "--out", str(out)]
        flags += ["--images", str(images.resolve())] if images else []
        run_in(tree, ["speedrun", "try", task.folder, str((folder / RECIPE).resolve()), *flags], task.threads)
        here = read_attempt(out)
        if (judged := score_of(task, out).distance) != here.result.distance:
            raise RunFailed(
                f"seed {seed}: {judged:.6g} by this clone's judge, {here.result.distance:.6g} by the record's"
            )
        compare(found, task, here, folder / f"seed{seed}.jsonl", out / "log.jsonl", say)
    say(f"{folder}: true")


def compare(found: Record, task: Task, here: Attempt, theirs: Path, ours: Path, say: Say) -> None:
    """Holds a seed's second run, and its log, to the record's; RunFailed where they differ more than they may."""
    told = next(result for result in found.results if result.seed == here.result.seed)
    there = asdict(found.machine) | dict(found.versions)
    changed = differences(there, asdict(here.machine) | dict(here.versions))
    if told.flops != here.result.flops:
        raise RunFailed(
            f"seed {told.seed}: {here.result.flops:.6g} FLOPs here, {told.flops:.6g} in the record: not true"
        )
    if changed:
        say(f"another kind of machine: {'; '.join(changed)}: bits and times can't be compared, scores and FLOPs can")
        low, high = interval([result.distance for result in found.results])
        if not low <= here.result.distance <= high:
            raise RunFailed(
                f"seed {told.seed}: {here.result.distance:.4f} here; one more score of the record's kind lies within "
                f"{low:.4f} to {high:.4f} with {CONFIDENCE:.0%}: not true"
            )
        both = f"{here.result.distance:.4f} here, {told.distance:.4f} there"
        say(f"seed {told.seed}: {both}, within {low:.4f} to {high:.4f}")
        return
    if named := differences(_measured(theirs), _measured(ours)):
        raise RunFailed(f"{theirs}: another log on the same kind of machine: {'; '.join(named[:NAMED])}: not true")
    if named := differences(asdict(replace(told, seconds=0.0)), asdict(replace(here.result, seconds=0.0))):
        raise RunFailed(f"seed {told.seed}: other bits on the same kind of machine: {'; '.join(named)}: not true")
    say(f"seed {told.seed}: the same to the bit: weights, samples, score and every line of its log")
    ratio = here.result.seconds / told.seconds
    confirmed = "" if ratio <= SLOWER else ": not confirmed; was this machine busy?"
    say(f"time: {here.result.seconds:.1f} s here, {told.seconds:.1f} s there{confirmed}")


def _measured(log: Path) -> dict[str, dict[str, Any]]:
    """The lines on training, without times, by stage and step: what an interrupted run has logged twice counts once."""
    return {
        f"{record['stage']} {record['kind']} {record['step']}": {key: record.get(key) for key in MEASURED}
        for record in log_records(log)
        if record["kind"] in ("train", "end")
    }
