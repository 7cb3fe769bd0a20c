"""Runs a study's list in one process: what is done is passed over, what was cut off goes on where it stood."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from st_fast.core.errors import Interrupted, UserError
from st_fast.core.signals import stop_on_signals
from st_fast.prepare.digits import prepare_digits
from st_fast.recipe import Recipe, load_run, to_toml
from st_fast.report.collect import read_run
from st_fast.study.plan import Job, Study, jobs
from st_fast.study.teachers import write_random_teacher, write_shuffled
from st_fast.train.run import run


def carry_out(study: Study, out: Path, minutes: float) -> None:
    """Runs every job that isn't done. Interrupted when `minutes` are over, or after a signal, with all work saved.

    UserError if a folder holds a run of another recipe than the study's.
    """
    todo = list(jobs(study, out))
    left = [job for job in todo if not done(job)]
    print(f"study {study.name}: {len(todo)} runs, {len(todo) - len(left)} done", flush=True)
    end = time.monotonic() + 60 * minutes
    with stop_on_signals() as stop:
        for number, job in enumerate(left, start=len(todo) - len(left) + 1):
            if stop or time.monotonic() >= end:
                why = stop.name or f"{minutes:g} minutes are over"
                raise Interrupted(f"{why}: {number - 1} of {len(todo)} runs are done; the same command continues")
            print(f"study {study.name}: run {number} of {len(todo)}: {job.folder}", flush=True)
            try:
                with _stopped_at(end):
                    _run(study, job, out)
            except Interrupted as error:
                raise Interrupted(f"{error} ({number - 1} of {len(todo)} runs are done)") from None


def done(job: Job) -> bool:
    """Whether the job's folder holds its finished run; UserError if it holds a run of another recipe."""
    kept = job.folder / "recipe.toml"
    if not kept.is_file():
        return False
    differing = difference(load_run(job.folder), job.recipe)
    if differing:
        raise UserError(f"{job.folder} holds a run of another recipe ({differing}); remove it or choose another --out")
    if not (job.folder / "log.jsonl").is_file():
        return False
    try:
        stages = read_run(job.folder).stages
    except UserError:  # a log that has only begun
        return False
    ends = [end["step"] for stage in stages for end in stage.records["end"]]
    untrained = job.teacher is not None and not job.teacher.trained
    return bool(ends) and ends[-1] == (0 if untrained else job.recipe.stages[0].steps)


def difference(kept: Recipe, wanted: Recipe) -> str:
    """The first line in which two resolved recipes differ, as “theirs, the study has ours”; "" where none does."""
    theirs, ours = to_toml(kept).splitlines(), to_toml(wanted).splitlines()
    for old, new in zip(theirs, ours, strict=False):
        if old != new:
            return f"{old}, the study has {new}"
    return "" if len(theirs) == len(ours) else "another number of stages"


def _run(study: Study, job: Job, out: Path) -> None:
    data = Path(study.base.sections.get("data", {}).get("path", ""))
    if job.teacher is not None and not job.teacher.trained:
        write_random_teacher(job.folder, job.recipe)
        return
    if job.teacher is not None and job.teacher.labels == "shuffled":
        if study.base.sections["data"].get("source") == "digits":
            prepare_digits(data, print)
        write_shuffled(data, Path(job.recipe.data.path), job.seed)
    run(job.recipe)


@contextmanager
def _stopped_at(end: float) -> Iterator[None]:
    """Asks this process to stop, as a person would, when the time is over: the trainer saves and the study ends."""
    if end == float("inf"):
        yield
        return
    timer = threading.Timer(max(0.0, end - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
