"""The parts of the suite, and one of them in a process of its own.

`python -m bench` starts that process, and again where it ends before its time. A part yields its rows as tasks; each is
stored as soon as it is measured, with what else the machine did meanwhile, and its error if it fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from bench import machine
from bench.machine import Machine, OthersLoad, Store, Suite, Task
from bench.measure import Row, give_memory_back
from st_fast.kernels.heap import keep_freed_memory

LEAST_SECONDS = 5.0
"""Left of the time, or no further row is begun."""
LONGEST_ROW = 200.0
"""Seconds: a row that had more and did not end never will, and keeps its error."""
STOPPED = 3
"""Exit code: the time is over, and rows are left."""
BROKEN = 4
"""Exit code: an error has left the device unusable for this process; its row has the error."""
UNFINISHED = "begun, not finished"
"""The error that a row has while it is measured: what a killed process leaves. Such a row is measured again."""


@dataclass(frozen=True)
class Part:
    """Rows of one kind: their section of the results file, and the function `module:name` that yields their tasks."""

    section: str
    source: str
    default: str
    """Where it is measured unasked: on "cpu", on "cuda", and on either with --full."""
    about: str

    def tasks(self, suite: Suite) -> Iterator[Task]:
        """Those that the suite asks for by name."""
        module, name = self.source.split(":")
        tasks: Iterator[Task] = getattr(importlib.import_module(f"bench.{module}"), name)(suite)
        return (task for task in tasks if suite.names(task[0]))


PARTS = {
    "build": Part("csrc", "checks:build", "cuda", "whether csrc is compiled and loaded"),
    "truth": Part("correctness", "checks:truth", "cuda", "every op and the optimiser against float64"),
    "attention": Part("attention backends", "checks:attention", "cuda", "every backend: is it right, and how fast"),
    "compiled": Part("compiled equals eager", "checks:compiled", "cuda", "every op, and three steps of every stage"),
    "ops": Part("kernels", "ops:ops", "cpu cuda", "every op against eager PyTorch and torch.compile"),
    "optimiser": Part("kernels", "optimiser:optimisers", "cpu cuda", "clip, AdamW and average against PyTorch's own"),
    "launch-overhead": Part("launch overhead", "ops:overheads", "cpu cuda", "Python's time of a call, microseconds"),
    "step": Part("step", "step:steps", "cpu cuda", "the whole step against the published loop; --full: more rivals"),
    "methods": Part("methods", "groups:methods", "cpu", "steps of methods without an encoder, beside a plain one"),
    "groups": Part("separated attention", "groups:separated", "cpu", "attention within groups of tokens, no mask"),
    "demo": Part("demo", "ablations:demo", "cpu cuda", "`make demo`'s step, with all ops and with none"),
    "first-step": Part("first step", "ablations:first_step", "cpu cuda", "from starting Python to the first step"),
    "schedules": Part("schedules", "ablations:schedules", "cuda", "streams, prefetching, graphs beside the default"),
    "choices": Part("choices", "ablations:choices", "cuda", "every choice of the recipe, beside the default"),
    "profile": Part("longest kernels", "ablations:profiles", "cuda", "a step's longest kernels by name"),
    "loading": Part("loader", "loading:loaders", "cpu cuda", "every loader against the published one"),
    "sampling": Part("sampling", "sampling:samplers", "cpu cuda", "drawing images against a plain sampler"),
    "contention": Part("contention", "ablations:contention", "cpu", "training beside other work"),
    "sweep": Part("sweep", "ablations:sweep", "cuda full", "how the step grows with batch, tokens and depth"),
    "convergence": Part("convergence", "checks:convergence", "cuda", "does it train: CIFAR-10, as far as time allows"),
}  # fmt: skip
"""By name on the command line, in the order in which they are measured."""


def defaults(kind: str, small: bool, full: bool) -> list[str]:
    """What is measured unasked: on such a device, and in a rehearsal all of a GPU's."""
    wanted = {kind, "cuda" if small else kind, "full" if full else kind}
    return [name for name, part in PARTS.items() if wanted & {*part.default.split()}]


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
    give_memory_back(device)


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


def run(suite: Suite, name: str) -> int:
    """Goes through a part's rows until the time is spent; the exit code."""
    section = PARTS[name].section
    failed, unfinished = False, False
    for key, task in PARTS[name].tasks(suite):
        row = suite.store.rows(section).get(key, {})
        wanted = suite.wants(row)
        if wanted and suite.left < LEAST_SECONDS:
            print(f"stopped before {name}: {key}; run the same command again", flush=True)
            return STOPPED
        if wanted:
            row = _measured(suite, section, key, task)
            if "OutOfTime" in row.get("error", ""):
                print(f"stopped within {name}: {key}: {said(row)}; run the same command again", flush=True)
                return STOPPED
            unfinished |= bool(row.get("unfinished")) and not suite.small
        failed |= not row.get("ok", True)
        print(f"{name}: {key}: {said(row)}{'' if wanted else ' (measured before)'}", flush=True)
        if wanted and "error" in row and broken(suite.device):
            return BROKEN
    if unfinished and not failed:
        print(f"{name} is not finished; run the same command again", flush=True)
        return STOPPED
    return 1 if failed else 0


def _measured(suite: Suite, section: str, key: str, task: Callable[[], Row]) -> Row:
    """Measures a row and stores it; one that the end of the time has cut short stays to be measured again."""
    left, taken = suite.left, suite.store.machine
    code = {"code": taken.code}
    suite.store.put(section, key, {"ok": False, "error": UNFINISHED, "unfinished": True, "had": left} | code)
    tidy_up(suite.device)
    others = OthersLoad()
    row = attempt(task, left) | code
    row = {"load": round(others.read(taken.load), 2)} | row | {"taken": {"commit": taken.commit, "date": taken.date}}
    if "OutOfTime" not in row.get("error", "") or left > LONGEST_ROW:
        suite.store.put(section, key, row)
    return row


def said(row: Row) -> str:
    """A row in a few words."""
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    if "runs" in row:
        return f"{row['done']} of {row['runs']} runs are done"
    notices = "; ".join(row.get("notices", ()))
    return row.get("error") or row.get("wrong") or notices or ("ok" if row.get("ok", True) else "WRONG")


def the_machine(file: Path, device: torch.device, small: bool = False) -> Machine:
    """What the first part of this call has found out about the machine; measured where this is the first."""
    if not file.exists():
        found = machine.measure_machine(device, small)
        if found.busy:
            print(f"This machine is busy (load {found.load} a core): these figures are not results.", file=sys.stderr)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(dataclasses.asdict(found)))
        os.replace(aside, file)
    return Machine(**json.loads(file.read_text()))


def named_file(machine: Path) -> Path:
    """Beside the file about the machine: a line for each name of `--only` that a part has found a row of."""
    return machine.with_name("named")


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; its exit code."""
    start = time.monotonic()
    machine.end_with_the_parent()
    keep_freed_memory()  # as a run does; ops measured beside ours gain as much, whole loops have processes of their own
    parser = argparse.ArgumentParser(prog="python -m bench.suite")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--machine", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", action="append", default=[])
    for flag in ("small", "full", "again", "keep"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args(arguments)
    device = machine.default_device()
    try:
        store = Store(given.results, the_machine(given.machine, device, given.small))
    except torch.cuda.OutOfMemoryError:
        print(f"{given.part}: other processes hold the device's memory: there is none for a copy", file=sys.stderr)
        return 2
    earlier = machine.FOLDER / store.path.name
    if earlier.exists() and not store.path.exists() and not given.small:
        shutil.copyfile(earlier, store.path)
    with tempfile.TemporaryDirectory(prefix="st_fast-suite-") as folder:
        suite = Suite(
            device, store, given.small, given.full, start + given.seconds,
            Path(folder) if given.small else Suite.runs, tuple(given.only), given.again, given.keep,
        )  # fmt: skip
        try:
            code = run(suite, given.part)
            with named_file(given.machine).open("a") as file:
                file.writelines(f"{name}\n" for name in suite.found)
            return code
        except (machine.Damaged, OSError) as error:  # of the rows: what a row itself meets is its own
            print(error, file=sys.stderr)
            return 2


if __name__ == "__main__":
    raise SystemExit(main())
