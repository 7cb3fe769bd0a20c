"""The demo's step beside other work: images/s with OpenMP as it comes and as st_fast makes it wait.

    python -m bench.contention                           the row, in about a minute
    python -m bench.contention --spins 100 1000 10000    also fixed values of GOMP_SPINCOUNT, for comparison

Every setting has processes of its own that make steps when they are told to, one at a time, in turns: on the machine
as it is found ("quiet"), beside hogs, which are processes that only count, and within a cgroup's CPU quota.

A process of T threads beside N hogs on C cores is due min(T, C·T / (T + N)) cores' time, within a quota of Q cores
min(T, Q). That over min(T, C), what it has alone, is its fair part. "share" is images/s over fair part × images/s of
OpenMP as it comes when alone, with its T in both: 1 means that contention costs nothing beyond the time it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AS_IT_COMES, OURS = "as it comes", "st_fast"
QUIET = "quiet"
WINDOW, QUIET_WINDOW = 0.6, 1.8
"""Seconds of steps at a time, for a hundred of the scheduler's slices; longer where the goal is two percent."""
SETTLING = 0.6
"""Seconds of steps before, until st_fast has seen that others are there."""
WARMUP = 3
STRIPPED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Taken from the environment, so that what is measured is what is named."""
CPU_CGROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Where groups with a CPU quota may be made: cgroup v1's controller, or v2."""
PERIOD_US = 100_000
HOG = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""
"""Ends with the process that started it, whose number it is given, even if that ended before this one began."""


@dataclass(frozen=True)
class Condition:
    """What is beside the step: hogs, or a quota in cores (0: none)."""

    name: str
    hogs: int = 0
    quota: float = 0.0

    def fair(self, threads: int, cores: int) -> float:
        """The part of its quiet time that a process of so many threads is due; see the module's text."""
        alone = min(threads, cores)
        if self.quota:
            return min(threads, self.quota) / alone
        return min(threads, cores * threads / (threads + self.hogs)) / alone


def conditions(cores: int) -> list[Condition]:
    """Quiet, one hog, as many hogs as cores, and quotas of half and of three quarters of the cores."""
    beside = [Condition(f"{n} hog{'s' * (n > 1)}", hogs=n) for n in dict.fromkeys((1, cores))]
    within = [Condition(f"quota {quota:g}", quota=quota) for quota in (cores / 2, 0.75 * cores)]
    return [Condition(QUIET), *beside, *within]


@dataclass
class Window:
    """One run of steps."""

    images: int
    seconds: float
    cpu_seconds: float
    others: float
    """Processors' time that other processes took, hogs among them, in processors."""

    @property
    def rate(self) -> float:
        return self.images / self.seconds


@dataclass
class Worker:
    """A process with the demo's step in it. `windows`: what it has done, by condition."""

    process: subprocess.Popen[str]
    threads: int = 0
    windows: dict[str, list[Window]] = field(default_factory=dict)

    def read(self) -> Any:
        """RuntimeError if the process has ended; its own message is on stderr."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("a process of bench.contention has ended; its own message is above")
        return json.loads(line)

    def run(self, condition: str) -> None:
        """Makes steps for a window's time, at least one."""
        if condition != QUIET:
            self._steps(SETTLING)
        before = _busy_seconds()
        images, wall, own = self._steps(QUIET_WINDOW if condition == QUIET else WINDOW)
        others = (_busy_seconds() - before - own) / wall
        self.windows.setdefault(condition, []).append(Window(images, wall, own, others))

    def _steps(self, seconds: float) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self.read()

    def rates(self, condition: str) -> list[float]:
        return [window.rate for window in self.windows[condition]]


def _busy_seconds() -> float:
    """All processors' time in use since the machine's start."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def worker(setting: str, environment: Mapping[str, str], group: Path | None = None) -> Iterator[Worker]:
    """Starts a process, in a cgroup if one is named; it is ready once `read` has told its threads."""
    clean = {key: value for key, value in os.environ.items() if key not in STRIPPED}
    join = (lambda: _write(group / "cgroup.procs", "0")) if group else None
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.contention", "--worker", setting], cwd=ROOT, env={**clean, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=join,
    )  # fmt: skip
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """So many processes that take what time they get, at this process's priority."""
    running = [subprocess.Popen([sys.executable, "-c", HOG, str(os.getpid())]) for _ in range(count)]
    try:
        if running:
            time.sleep(0.1)
        yield
    finally:
        for hog in running:
            hog.kill()
            hog.wait()


@contextmanager
def quota_group(quota: float) -> Iterator[Path]:
    """A cgroup with this quota, in cores, removed on leaving. OSError where none may be made."""
    error = OSError("no cgroup with a CPU controller can be made here")
    for parent in CPU_CGROUPS:
        group = parent / f"st_fast_bench_{os.getpid()}_{quota:g}"
        try:
            group.mkdir()
        except OSError as refusal:
            error = refusal
            continue
        try:
            if (group / "cpu.max").exists():
                _write(group / "cpu.max", f"{round(quota * PERIOD_US)} {PERIOD_US}")
            elif (group / "cpu.cfs_quota_us").exists():
                _write(group / "cpu.cfs_period_us", str(PERIOD_US))
                _write(group / "cpu.cfs_quota_us", str(round(quota * PERIOD_US)))
            else:
                continue
            yield group
            return
        finally:
            group.rmdir()
    raise error


def _write(file: Path, text: str) -> None:
    file.write_text(text)


def measure(seconds: float = 50.0, more: Mapping[str, Mapping[str, str]] | None = None) -> dict[str, Any]:
    """One row: images/s and share by condition and setting, for about so many seconds. more: other settings' variables.

    Where no cgroup can be made, "skipped" says why there is no quota.
    """
    from st_fast.core.machine import usable_cpus

    settings = {AS_IT_COMES: {}, OURS: {}, **(more or {})}
    cores, skipped = usable_cpus(), {}
    with ExitStack() as stack:
        free = {name: stack.enter_context(worker(name, given)) for name, given in settings.items()}
        workers: dict[Condition, dict[str, Worker]] = {}
        for condition in conditions(cores):
            workers[condition] = free
            if condition.quota:
                try:
                    group = stack.enter_context(quota_group(condition.quota))
                except OSError as error:
                    skipped[condition.name] = str(error)
                    del workers[condition]
                    continue
                workers[condition] = {n: stack.enter_context(worker(n, g, group)) for n, g in settings.items()}
        for each in {id(w): w for group in workers.values() for w in group.values()}.values():
            each.threads = each.read()
        rounds = _take_turns(workers, seconds)
    return _row(workers, cores, rounds) | ({"skipped": skipped} if skipped else {})


def _take_turns(workers: Mapping[Condition, Mapping[str, Worker]], seconds: float) -> int:
    """Rounds over all conditions, each setting in turn, forwards and backwards; at least three."""
    start, number = time.perf_counter(), 0
    while number < 3 or time.perf_counter() - start < seconds:
        for condition, group in workers.items():
            with hogs(condition.hogs):
                for name in list(group) if number % 2 == 0 else reversed(list(group)):
                    group[name].run(condition.name)
        number += 1
    return number


def _row(workers: Mapping[Condition, Mapping[str, Worker]], cores: int, rounds: int) -> dict[str, Any]:
    from bench.measure import noise, paired_ratio, ratios

    quiet = next(iter(workers.values()))
    alone, threads = quiet[AS_IT_COMES].rates(QUIET), quiet[AS_IT_COMES].threads
    middle = {c.name: {n: statistics.median(w.rates(c.name)) for n, w in g.items()} for c, g in workers.items()}
    fair = {c.name: c.fair(threads, cores) for c in workers}
    base = statistics.median(alone)
    return {
        "recipe": "digits", "stage": "stage 2", "batch": 64, "cores": cores, "rounds": rounds,
        "threads": {c.name: {name: w.threads for name, w in group.items()} for c, group in workers.items()},
        "images_per_s": middle,
        "fair": fair,
        "share": {
            c: {name: rate / (fair[c] * base) for name, rate in rates.items()}
            for c, rates in middle.items() if c != QUIET
        },
        "quiet": {name: paired_ratio(w.rates(QUIET), alone) for name, w in quiet.items()},
        "noise": noise(alone),
        "noise_of": {
            "share": max((noise(w.rates(c.name)) for c, group in workers.items() if c.name != QUIET
                          for name, w in group.items() if name == OURS), default=0.0),
            "quiet": max(noise(ratios(w.rates(QUIET), alone)) for w in quiet.values()),
        },
        "others": statistics.median(max(0.0, w.others) for one in quiet.values() for w in one.windows[QUIET]),
    }  # fmt: skip


def table(row: Mapping[str, Any]) -> str:
    """The row for a terminal: images/s, and the share of what is fair in percent."""
    names = list(row["quiet"])
    lines = [f"{'images/s (share of fair)':<26}" + "".join(f"{name:>20}" for name in names)]
    for condition, rates in row["images_per_s"].items():
        cells = [f"{rates[name]:.0f}" for name in names]
        if condition != QUIET:
            cells = [f"{c} ({100 * row['share'][condition][n]:.0f} %)" for c, n in zip(cells, names, strict=True)]
        lines.append(f"{condition:<26}" + "".join(f"{cell:>20}" for cell in cells))
    ratios = "".join(f"{row['quiet'][name]:>19.3f}×" for name in names)
    lines.append(f"{'quiet, in pairs':<26}{ratios}")
    lines.append(f"noise ± {100 * row['noise']:.1f} %, {row['rounds']} rounds; others used {row['others']:.2f} cores")
    return "\n".join(lines + [f"{name}: skipped, {why}" for name, why in row.get("skipped", {}).items()])


def work(setting: str) -> None:
    """A worker: prints its threads, then for every line of seconds [images, seconds, CPU seconds]."""
    if setting == AS_IT_COMES:
        import torch  # before st_fast, which then leaves OpenMP as it is
    else:
        import torch

        import st_fast  # noqa: F401
    from bench.workload import Setup, ours
    from st_fast.core.contention import watched

    setup = Setup("digits", "stage 2", 64, torch.device("cpu"))
    with ours(setup) as loop, watched(1 if setting == AS_IT_COMES else torch.get_num_threads()):
        for _ in range(WARMUP):
            loop()
        print(torch.get_num_threads(), flush=True)
        for line in sys.stdin:
            start, own, steps = time.perf_counter(), time.process_time(), 0
            while not steps or time.perf_counter() - start < float(line):
                loop()
                steps += 1
            print([setup.batch * steps, time.perf_counter() - start, time.process_time() - own], flush=True)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m bench.contention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=50.0, help="how long to measure, beside starting (50)")
    parser.add_argument("--spins", type=int, nargs="+", default=[], help="values of GOMP_SPINCOUNT to compare")
    parser.add_argument("--json", action="store_true", help="print the row as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(list(arguments))
    if given.worker:
        work(given.worker)
        return
    more = {f"spins {count}": {"GOMP_SPINCOUNT": str(count)} for count in given.spins}
    row = measure(given.seconds, more)
    print(json.dumps(row, indent=1) if given.json else table(row))


if __name__ == "__main__":
    main(sys.argv[1:])
