"""A GPU day's last part: does it train? CIFAR-10's study as far as the time allows, and samples of what is trained.

What is brought home lies beside the rows: `runs.tar.gz` (recipes, logs, pictures; no checkpoints) and a set of samples
an arm, `samples-ARM.npz`, which `python -m st_fast.evaluate RUN --samples FILE` scores where the real images are.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.day import Day, Task, end_with_the_one_who_started_this
from bench.machine import ROOT, Row
from st_fast.core.errors import EXIT_INTERRUPTED
from st_fast.report.collect import read_run
from st_fast.study.carry_out import done
from st_fast.study.plan import Job, jobs, read_study

REACHED = ("step", "loss", "denoise", "images_per_s", "mfu", "seconds", "flops")
SAVING = 90.0
"""Seconds kept for the study to save, for samples and for the records to be read."""
SAMPLES, FEW = 4_000, 100
"""Samples of an arm: 12 MB; of a rehearsal."""


def convergence(day: Day) -> Iterator[Task]:
    """As much of the study as fits; a row a run that has begun, one of how many are done, and one an arm's samples."""
    study = ROOT / "bench" / ("day_rehearsal.toml" if day.small else "day_cifar10.toml")
    out = day.runs / study.stem
    yield study.stem, partial(_study, day, study, out)
    for job in jobs(read_study(study), out):
        if job.arm is not None:
            yield f"samples of {job.arm.name}", partial(_samples, day, job)


def _study(day: Day, study: Path, out: Path) -> Row:
    """Trains until the time is nearly over; a study that is not done is asked for again by the next call."""
    if not day.small and not (day.data / "manifest.json").is_file():
        raise FileNotFoundError(f"{day.data}: no latents; bench/pack.sh makes them, bench/day.sh puts them there")
    seconds = day.left - SAVING
    if seconds <= 0:
        raise TimeoutError(f"{day.left:.0f} s are left, and {SAVING:.0f} of them are for saving")
    minutes = ("--minutes", f"{seconds / 60:.3f}")
    code = _command("st_fast.study", str(study), "--out", str(out), *minutes, allowed=(0, EXIT_INTERRUPTED))
    planned = list(jobs(read_study(study), out))
    for job in planned:
        if (job.folder / "log.jsonl").is_file():
            day.store.put("convergence", str(job.folder.relative_to(out)), _reached(job.folder))
    if out.is_dir():
        _bring_home(out, day.store.path.with_name("runs.tar.gz"))
    return {"ok": True, "done": sum(map(done, planned)), "runs": len(planned), "unfinished": code != 0}


def _reached(folder: Path) -> Row:
    """How far a run is: its last record."""
    stage = read_run(folder).stages[-1]
    trained = stage.records["train"]
    return {"stage": stage.name} | ({key: trained[-1].get(key) for key in REACHED} if trained else {})


def _bring_home(out: Path, archive: Path) -> None:
    """The runs without their weights and caches, as one file."""

    def light(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(member.name).name in ("checkpoints", "compiled", "data") else member

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(out, arcname=out.name, filter=light)


def _samples(day: Day, job: Job) -> Row:
    """A set of an arm's samples, for classes by turns."""
    assert job.arm is not None
    if not done(job):
        return {"ok": True, "left_out": "its run is not done", "unfinished": True}
    count = FEW if day.small else SAMPLES
    _command("st_fast.sample", str(job.folder), "-n", str(count), "--npz")
    (drawn,) = job.folder.glob("*/samples/*/samples.npz")
    target = day.store.path.with_name(f"samples-{job.arm.name}.npz")
    shutil.copyfile(drawn, target)
    return {"ok": True, "file": target.name, "num": count}


def _command(module: str, *arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    """Runs a command of st_fast; RuntimeError with its last line if it ends with another code than is allowed."""
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=end_with_the_one_who_started_this,
    )  # fmt: skip
    if ended.returncode not in allowed:
        raise RuntimeError(f"{module}: {(ended.stdout.strip().splitlines() or ['no output'])[-1]}")
    return ended.returncode
