"""A GPU day's last part: does it train? The CIFAR-10 study, as far as the time allows; the same command goes on."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.day import Day, Task
from bench.results import ROOT, Row
from st_fast.errors import EXIT_INTERRUPTED
from st_fast.report.collect import read_run
from st_fast.study.carry_out import done
from st_fast.study.plan import jobs, read_study

REACHED = ("step", "loss", "denoise", "images_per_s", "mfu", "seconds", "flops")
SAVING = 90.0
"""Seconds kept for the study to save and for its records to be read."""
REHEARSAL = 20.0
"""Seconds that the small one trains."""


def convergence(day: Day) -> Iterator[Task]:
    """The data, then as much of the study as fits; a row a run that has begun, and one of how many are done."""
    study = ROOT / "recipes" / "study" / ("digits.toml" if day.small else "cifar10_gpu.toml")
    out = day.runs / study.stem
    if not day.small:
        yield "data", partial(_prepare, day.cifar, ROOT / "data" / "cifar10")
    yield study.stem, partial(_study, day, study, out)


def _prepare(source: Path, data: Path) -> Row:
    """Latents of a small VAE and the judge's images, each unless it is there."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: CIFAR-10 as a zip, by --cifar")
    if not (data / "manifest.json").exists():
        _command("st_fast.prepare", str(source), str(data), "--subset", "train", "--size", "32", "--vae", "small")
    if not (data / "images.safetensors").exists():
        _command("st_fast.data.real_images", str(source), str(data), "--size", "32")
    return {"ok": True, "data": str(data.relative_to(ROOT))}


def _study(day: Day, study: Path, out: Path) -> Row:
    """Trains until the time is nearly over; a study that is not done is asked for again by the next call."""
    seconds = min(REHEARSAL if day.small else math.inf, day.left - SAVING)
    if seconds <= 0:
        raise TimeoutError("no time is left for training")
    minutes = () if math.isinf(seconds) else ("--minutes", f"{seconds / 60:.3f}")
    code = _command("st_fast.study", str(study), "--out", str(out), *minutes, allowed=(0, EXIT_INTERRUPTED))
    planned = list(jobs(read_study(study), out))
    for job in planned:
        if (job.folder / "log.jsonl").is_file():
            day.store.put("convergence", str(job.folder.relative_to(out)), _reached(job.folder))
    return {"ok": True, "done": sum(map(done, planned)), "runs": len(planned), "unfinished": code != 0}


def _reached(folder: Path) -> Row:
    """How far a run is: its last record of each kind."""
    stage = read_run(folder).stages[-1]
    trained, scored = stage.records["train"], stage.records["eval"]
    row: Row = {"stage": stage.name}
    if trained:
        row |= {key: trained[-1].get(key) for key in REACHED}
    return row | ({"scored_at": scored[-1]["step"], "metrics": scored[-1]["metrics"]} if scored else {})


def _command(module: str, *arguments: str, allowed: tuple[int, ...] = (0,)) -> int:
    """Runs a command of st_fast; RuntimeError with its last line if it ends with another code than is allowed."""
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode not in allowed:
        raise RuntimeError(f"{module}: {(ended.stdout.strip().splitlines() or ['no output'])[-1]}")
    return ended.returncode
