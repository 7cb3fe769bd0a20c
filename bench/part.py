"""One part of a GPU day in a process of its own: `bench.gpu_day` starts it, and again where it ends before its time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from bench import day_fast, day_right, day_works, op_times
from bench import machine as results
from bench import step as step_times
from bench.day import Day, Task, end_with_the_one_who_started_this
from bench.machine import Machine, Row, Store

LEAST_SECONDS = 5.0
"""Left in the budget, or no further row is begun."""
LONGEST_ROW = 200.0
"""Seconds: a row that had more and did not end never will, and keeps its error."""
STOPPED = 3
"""Exit code: the time is over, and rows are left."""
BROKEN = 4
"""Exit code: an error has left the device unusable for this process; its row has the error."""
UNFINISHED = "begun, not finished"
"""The error that a row has while it is measured: what a killed process leaves. Such a row is measured again."""

PARTS: dict[str, tuple[Callable[[Day], Iterator[Task]], str]] = {
    "build": (day_right.build, "csrc"),
    "truth": (day_right.truth, "correctness"),
    "attention": (day_right.attention, "attention backends"),
    "compiled": (day_right.compiled, "compiled equals eager"),
    "kernels": (day_fast.kernels, "kernels"),
    "step": (day_fast.step, "step"),
    "schedule": (day_fast.schedule, "schedules"),
    "first": (day_fast.first, "first step"),
    "profile": (day_fast.profile, "longest kernels"),
    "choice": (day_fast.choice, "choices"),
    "sweep": (day_fast.sweep, "sweep"),
    "convergence": (day_works.convergence, "convergence"),
}
"""Name on the command line → (what yields its tasks, its part in the results file)."""


class OutOfTime(BaseException):
    """The time for a row is over. No Exception: whoever takes those for a failure of their own must not take this."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside when the time is up, once a second until it is heard."""

    def late(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(task: Callable[[], Row], seconds: float) -> Row:
    """The row, or a row that says what went wrong."""
    try:
        with at_most(seconds):
            return task()
    except (Exception, OutOfTime) as error:  # one broken row must not cost the others the device's time
        lines = str(error).strip().splitlines()
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        return {
            "ok": False,
            "error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300],
            "where": frames[-6:],
        }


def tidy_up(device: torch.device) -> None:
    """What the last row left: its memory, and compiled forms, of which a process may have only so many."""
    torch._dynamo.reset()
    step_times.give_memory_back(device)


def broken(device: torch.device) -> bool:
    """Whether an error has left the device unusable for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def run(day: Day, part: str) -> int:
    """Goes through a part's rows until the budget is spent; the exit code."""
    tasks, section = PARTS[part]
    failed, found, unfinished = False, False, False
    for key, task in tasks(day):
        if day.only not in key:
            continue
        found = True
        row = day.store.rows(section).get(key, {})
        wanted = day.wants(row)
        if wanted and day.left < LEAST_SECONDS:
            print(f"stopped before {part}: {key}; run the same command again", flush=True)
            return STOPPED
        if wanted:
            row = _measured(day, section, key, task)
            if "OutOfTime" in row.get("error", ""):
                print(f"stopped within {part}: {key}: {said(row)}; run the same command again", flush=True)
                return STOPPED
            unfinished |= bool(row.get("unfinished")) and not day.small
        failed |= not row.get("ok", True)
        print(f"{part}: {key}: {said(row)}", flush=True)
        if wanted and "error" in row and broken(day.device):
            return BROKEN
    if not found:
        print(f"--only {day.only}: no row of {part} has that in its name", file=sys.stderr)
        return 2
    if unfinished:
        print(f"{part} is not finished; run the same command again", flush=True)
        return STOPPED
    return 1 if failed else 0


def _measured(day: Day, section: str, key: str, task: Callable[[], Row]) -> Row:
    """Measures a row and stores it; one that the end of the budget has cut short stays to be measured again."""
    left, code = day.left, {"code": day.store.machine.code}
    day.store.put(section, key, {"ok": False, "error": UNFINISHED, "unfinished": True, "had": left} | code)
    tidy_up(day.device)
    row = attempt(task, left) | code
    if "OutOfTime" not in row.get("error", "") or left > LONGEST_ROW:
        day.store.put(section, key, row)
    return row


def said(row: Row) -> str:
    """A row in a few words."""
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    if "runs" in row:
        return f"{row['done']} of {row['runs']} runs are done"
    notices = "; ".join(row.get("notices", ()))
    return row.get("error") or row.get("wrong") or notices or ("ok" if row.get("ok", True) else "WRONG")


def the_machine(file: Path, device: torch.device) -> Machine:
    """What the first part of this call has found out about the machine; measured where this is the first."""
    if not file.exists():
        machine = results.measure_machine(device)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(dataclasses.asdict(machine)))
        os.replace(aside, file)
    return Machine(**json.loads(file.read_text()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; its exit code."""
    start = time.monotonic()
    end_with_the_one_who_started_this()
    parser = argparse.ArgumentParser(prog="python -m bench.part")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--machine", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--only", default="")
    for flag in ("small", "again", "keep"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args(arguments)
    device = op_times.default_device()
    try:
        store = Store(given.results, the_machine(given.machine, device))
    except torch.cuda.OutOfMemoryError:
        print(f"{given.part}: other processes hold the device's memory: there is none for a copy", file=sys.stderr)
        return 2
    earlier = results.FOLDER / store.path.name
    if earlier.exists() and not store.path.exists() and not given.small:
        shutil.copyfile(earlier, store.path)
    with tempfile.TemporaryDirectory(prefix="st_fast-day-") as folder:
        runs = Path(folder) if given.small else Day.runs
        until = start + given.budget
        day = Day(device, given.small, store, until, runs, given.only, given.again, given.keep)
        try:
            return run(day, given.part)
        except (results.Damaged, OSError) as error:  # of the rows: what a row itself meets is its own
            print(error, file=sys.stderr)
            return 2


if __name__ == "__main__":
    raise SystemExit(main())
