"""Everything that only a GPU can tell, by one command that can be run again until it is done.

    python -m bench.gpu_day                    all parts, one after another, for at most --budget seconds
    python -m bench.gpu_day --parts truth      some of them
    python -m bench.gpu_day --small            the same at sizes that a CPU does in minutes: a rehearsal

Rows are written as they are measured, to $OUT or bench/results, and not measured again while the sources stay; a row
that fails or takes too long keeps its error and the next one goes on. Exit code: 0 done, 1 a check failed, 3 not done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bench import day_fast, day_right, day_works, op_times, results, sweeps
from bench.day import Day, Task
from bench.results import Row, Store

LEAST_SECONDS = 5.0
"""Left in the budget, or no further row is begun."""

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


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when the time is up."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
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
    except Exception as error:  # one broken row must not cost the others the device's time
        lines = str(error).strip().splitlines()
        return {"ok": False, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}


def run(day: Day, parts: list[str], budget: float, again: bool) -> int:
    """Goes through the parts until the budget is spent; the exit code."""
    start, failed = time.monotonic(), False
    for part in parts:
        tasks, section = PARTS[part]
        for key, task in tasks(day):
            row = day.store.rows(section).get(key, {})
            if _wanted(row, day.store.machine.code, again):
                left = budget - (time.monotonic() - start)
                if left < LEAST_SECONDS:
                    print(f"stopped before {part}: {key}; run the same command again")
                    return 3
                row = attempt(task, left) | {"code": day.store.machine.code}
                if "TimeoutError" in row.get("error", "") and left < budget / 2:
                    print(f"stopped within {part}: {key}; run the same command again")
                    return 3
                day.store.put(section, key, row)
                if row.get("unfinished") and not day.small:
                    print(f"stopped within {part}: {key}: {_said(row)}; run the same command again")
                    return 3
            failed |= not row.get("ok", True)
            print(f"{part}: {key}: {_said(row)}", flush=True)
    return 1 if failed else 0


def _wanted(row: Row, code: str, again: bool) -> bool:
    """Whether a row has still to be measured: by this code, to its end, or once more because it failed."""
    return row.get("code") != code or bool(row.get("unfinished")) or (again and "error" in row)


def _said(row: Row) -> str:
    """A row in a few words."""
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    if "runs" in row:
        return f"{row['done']} of {row['runs']} runs are done"
    return row.get("error") or row.get("wrong") or ("ok" if row.get("ok", True) else "WRONG")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, separated by commas")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal on any machine")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds")
    parser.add_argument("--again", action="store_true", help="try rows that failed once more")
    parser.add_argument("--results", type=Path, default=Path(os.environ.get("OUT") or results.FOLDER))
    parser.add_argument("--cifar", type=Path, default=Path("cifar10.zip"), help="CIFAR-10's images, for convergence")
    parser.add_argument("--runs", type=Path, help="folder of its runs (runs/gpu_day; small: beside the results)")
    settings = parser.parse_args()
    parts = settings.parts.split(",")
    for part in parts:
        if part not in PARTS:
            print(f"--parts {part}: one of {', '.join(PARTS)}", file=sys.stderr)
            return 2
    store = Store(settings.results, results.measure_machine(op_times.default_device()))
    earlier = results.FOLDER / store.path.name
    if earlier.exists() and not store.path.exists() and not settings.small:
        store.path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier, store.path)
    runs = settings.runs or (settings.results / "runs" if settings.small else results.ROOT / "runs" / "gpu_day")
    until = time.monotonic() + settings.budget
    day = Day(op_times.default_device(), settings.small, store, until, settings.cifar.absolute(), runs.absolute())
    code = run(day, parts, settings.budget, settings.again)
    for picture in sweeps.draw(store.path):
        print(picture)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
