"""Whether a record is true: what `record.check` says of it, and one seed run again with the code of its revision.

On the same kind of machine with the same versions every bit has to be the same; elsewhere the seed's score has to be
where one more score of the record's kind lies.
"""

import math
import secrets
import tempfile
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from st_fast.core.comparison import differences
from st_fast.core.errors import Interrupted, RunFailed, Say, Stopped, UserError, shown
from st_fast.core.files import sha256_file
from st_fast.core.records import log_records
from st_fast.sample.set import SAMPLES
from st_fast.study.speedrun import record as records
from st_fast.study.speedrun.attempt import SAMPLES_FOLDER, Attempt, picture, read_attempt, score_of
from st_fast.study.speedrun.origin import Code, check_revision, check_scores, run_in, tree_of, unread
from st_fast.study.speedrun.record import PICTURE, RECIPE, Record
from st_fast.study.speedrun.task import CONFIDENCE, SIGNIFICANCE, Task, interval, p_value, read_task, task_names

SCORED = 1e-6
"""Share by which a score of the same samples may differ where it is taken on another number of threads."""
SLOWER = 1.25
"""Times of a seed's training here and in the record that differ by more are told to be unconfirmed."""
NAMED = 5
"""Differences that a line names at most."""
MEANS = ("loss", "denoise", "aux", "grad_norm", "direction")
"""Of a log's line: what is a mean over the steps since the line before."""
MEASURED = {
    "start": ("trunk_params", "flops_per_image", "teacher_flops_per_image"),
    "train": (*MEANS, "lr", "skipped", "flops"),
    "end": ("flops",),
}
"""Of a log's records, by their kind: what the same bits make the same."""


def verify(
    folder: Path, task_name: str | None, seed: int | Literal["all"] | None, data: Path, images: Path | None,
    run_changes: bool, rerun: bool, say: Say,
) -> None:  # fmt: skip
    """Checks the record in `folder` and tells each thing it found true; UserError or RunFailed at the first that isn't.

    task_name: where its task is, if it is none of this repository; seed: which one is run again (None: drawn now, so
    that nobody knew it); images: of a task that brings none; run_changes: whether code that came with the record, and
    is not in this clone's history, may be run here; rerun: False checks all that needs no training.
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
    if not rerun:
        say("not run again (--no-rerun): whether its recipe and code give these figures is unchecked")
        return
    if seed not in (None, "all", *task.seeds):
        raise UserError(f"--seed {seed}: the task has {', '.join(map(str, task.seeds))}")
    code = Code(found.revision, records.changes(folder))
    check_revision(code.revision)
    _check_changes(folder, unread(code), run_changes)
    seeds = task.seeds if seed == "all" else (secrets.choice(task.seeds) if seed is None else int(seed),)
    confirmed, distances = True, []
    try:
        with tree_of(code) as tree, tempfile.TemporaryDirectory(prefix="st_fast-speedrun-") as place:
            for number in seeds:
                say(f"seed {number}: running it again, {recipe.stages[-1].steps} steps of its last stage")
                out = Path(place) / f"seed{number}"
                flags = ["--seed", str(number), "--data", str(data.resolve()), "--out", str(out)]
                flags += ["--images", str(images.resolve())] if images else []
                run_in(tree, ["speedrun", "try", task.folder, str((folder / RECIPE).resolve()), *flags], task.threads)
                here = _scored_here(task, out)
                distances.append(here.result.distance)
                confirmed &= compare(found, task, here, folder / f"seed{number}.jsonl", out / "log.jsonl", say)
                if number == task.seeds[0] and records.same_kind(found, here):
                    _compare_pictures(folder / PICTURE, out)
    except (Stopped, Interrupted):
        raise Interrupted(f"{folder}: stopped before it was verified; the same command starts anew") from None
    if seed == "all" and (p := p_value(distances, task.target)) >= SIGNIFICANCE:
        raise RunFailed(f"{folder}: the scores here do not show a mean below {task.target:g} (p = {p:.1e}): not true")
    say(f"{folder}: true{', its time not confirmed' * (not confirmed)}")


def _check_changes(folder: Path, files: list[str], may_run: bool) -> None:
    """UserError where code that nobody here has read would run, or would score."""
    check_scores(folder, files)
    if files and not may_run:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise UserError(
            f"{folder}: code that is not in this clone's history would run here ({files[0]}{more}): read it, then "
            "--run-changes"
        )


def _scored_here(task: Task, out: Path) -> Attempt:
    """What a record's code tells of its run in `out`; RunFailed where its samples or their score are others here."""
    here, scored = read_attempt(out), score_of(task, out).distance
    seed, distance = here.result.seed, here.result.distance
    if sha256_file(out / SAMPLES_FOLDER / SAMPLES) != here.result.samples_sha256:
        raise RunFailed(f"seed {seed}: its samples have another hash than its code tells: not true")
    if not math.isclose(scored, distance, rel_tol=SCORED):
        raise RunFailed(f"seed {seed}: {scored:.6g} by this clone's scoring, {distance:.6g} by the record's: not true")
    return here


def _compare_pictures(told: Path, out: Path) -> None:
    """RunFailed where a record's picture is not of the samples that are drawn again."""
    here = np.asarray(Image.open(BytesIO(picture(out))).convert("RGB"))
    if not np.array_equal(records.check_picture(told), here):
        raise RunFailed(f"{told}: other samples than those drawn here: not true")


def compare(found: Record, task: Task, here: Attempt, theirs: Path, ours: Path, say: Say) -> bool:
    """Whether a seed's second run confirms its time; RunFailed where run and log differ more than they may."""
    told = next(result for result in found.results if result.seed == here.result.seed)
    changed = differences(asdict(found.machine), asdict(here.machine)) + differences(found.versions, here.versions)
    if told.flops != here.result.flops:
        raise RunFailed(
            f"seed {told.seed}: {here.result.flops:.6g} FLOPs here, {told.flops:.6g} in the record: not true"
        )
    if changed:
        say(f"another kind of machine: {'; '.join(changed)}: bits and times can't be compared, scores and FLOPs can")
        _compare_scores(found, task, here.result.distance, told.seed)
        say(f"seed {told.seed}: {here.result.distance:.4f} here, {told.distance:.4f} there: one more of its kind")
        return False
    if told.data_sha256 != here.result.data_sha256:
        raise RunFailed(f"seed {told.seed}: other latents on the same kind of machine: not true")
    *lines, partial = _measured(theirs, ours)
    if named := differences(*lines):
        raise RunFailed(f"{theirs}: another log on the same kind of machine: {'; '.join(named[:NAMED])}: not true")
    if named := differences(asdict(replace(told, seconds=0.0)), asdict(replace(here.result, seconds=0.0))):
        raise RunFailed(f"seed {told.seed}: other bits on the same kind of machine: {'; '.join(named)}: not true")
    say(f"seed {told.seed}: the same to the bit: weights, samples, score and what its log has of training")
    if partial:
        say(f"but for losses in {partial} lines, which are of part of their steps, as training was stopped within them")
    near = 1 / SLOWER <= here.result.seconds / told.seconds <= SLOWER
    say(
        f"time: {here.result.seconds:.1f} s here, {told.seconds:.1f} s there"
        f"{': not confirmed; was this machine busy?' * (not near)}"
    )
    return near


def _compare_scores(found: Record, task: Task, distance: float, seed: int) -> None:
    """RunFailed where a score from another kind of machine is none of the record's kind, or takes the target from it.

    The second, as a record could claim a spread as wide as its mean is low.
    """
    low, high = interval([result.distance for result in found.results])
    if not low <= distance <= high:
        raise RunFailed(
            f"seed {seed}: {distance:.4f} here; one more score of the record's kind lies within {low:.4f} to "
            f"{high:.4f} with {CONFIDENCE:.0%}: not true"
        )
    others = [result.distance for result in found.results if result.seed != seed]
    if (p := p_value([*others, distance], task.target)) >= SIGNIFICANCE:
        raise RunFailed(
            f"seed {seed}: {distance:.4f} here; with this score the record does not show a mean below {task.target:g} "
            f"(p = {p:.1e}): not true"
        )


def _measured(theirs: Path, ours: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What each log has of training, by stage, kind and step; and in how many lines losses are left out.

    They are where one of the runs was stopped within the steps of a line, so that it has the mean of the later ones
    alone. A step that was trained twice, after a run was killed, has two lines, which have to be the same.
    """
    logs, partial = [], set[str]()
    for log in (theirs, ours):
        lines, resumed = dict[str, list[dict[str, Any]]](), False
        for record in log_records(log):
            name = f"{record['stage']} {record['kind']} {record['step'] if record['kind'] != 'start' else ''}".rstrip()
            if record["kind"] == "start":
                resumed = record.get("resumed_from") != 0
            elif record["kind"] == "train" and resumed:
                resumed = False
                partial.add(name)
            if record["kind"] in MEASURED:
                lines.setdefault(name, []).append({key: record.get(key) for key in MEASURED[record["kind"]]})
        logs.append(lines)
    found = []
    for lines in logs:
        told = dict[str, Any]()
        for name, some in lines.items():
            less = [{key: one for key, one in line.items() if name not in partial or key not in MEANS} for line in some]
            told[name] = less[0] if all(line == less[0] for line in less) else {"lines": less}
        found.append(told)
    return found[0], found[1], len(partial)
