"""Everything that only a GPU can tell, by one command that can be run again until it is done.

    python -m bench.gpu_day                    all parts, one after another, for at most --budget seconds
    python -m bench.gpu_day --parts truth      some of them
    python -m bench.gpu_day --small --jobs 6   the same at sizes that a CPU does in minutes: a rehearsal

Each part is a process of its own (`bench.part`), which is started again where the device or the process breaks. Rows
are written as they are measured, to $OUT or bench/results, and not measured again while the sources stay (with --keep:
at all). Exit code: 0 done, 1 a row is wrong or failed, 2 nothing could be started, 3 not done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import machine as results
from bench.machine import Machine, Store
from bench.part import BROKEN, LEAST_SECONDS, LONGEST_ROW, PARTS, STOPPED, UNFINISHED
from st_fast.core.errors import UserError
from st_fast.core.lock import run_lock

GRACE = 15.0
"""Seconds over the budget that a part has to stop by itself before it is killed."""
MOST_SECONDS = 86_400.0
MOST_STARTS = 6
"""Of one part: a device that breaks each time is given up."""


@dataclass(frozen=True)
class Call:
    """One call of this command: what its parts are told, and until when (by time.monotonic())."""

    options: tuple[str, ...]
    results: Path
    machine: Path
    """Where the first part leaves what it found out about the machine, for the others."""
    until: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


def run_part(part: str, call: Call) -> int:
    """Runs a part to its end, as often as it has to be started; its exit code."""
    for _ in range(MOST_STARTS):
        if call.left < LEAST_SECONDS:
            print(f"stopped before {part}; run the same command again", flush=True)
            return STOPPED
        code, ended = _start(part, call)
        if code in (0, 1, 2, STOPPED):
            return code
        _give_up_row(part, call, ended)
        print(f"{part}: {ended}; goes on in a new process", flush=True)
    print(f"{part}: given up after {MOST_STARTS} starts", flush=True)
    return 1


def _start(part: str, call: Call) -> tuple[int, str]:
    """One process of a part, killed with all that it started when it outstays its time; its exit code, and in words."""
    command = [sys.executable, "-m", "bench.part", part, "--machine", str(call.machine), "--budget", f"{call.left:.1f}"]
    command += ["--results", str(call.results), *call.options]
    process = subprocess.Popen(command, cwd=results.ROOT, process_group=0)
    try:
        code = process.wait(max(call.left, 0.0) + GRACE)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        _give_up_row(part, call, "it did not stop in time and was killed", least=LONGEST_ROW)
        return STOPPED, ""
    if code == BROKEN:
        return code, "the device is broken for this process"
    return code, f"the process died of signal {-code}" if code < 0 else f"the process ended with code {code}"


def _give_up_row(part: str, call: Call, why: str, least: float = 0.0) -> None:
    """Gives the row that the process was at an error in place of its mark; one that had less time keeps the mark."""
    if not call.machine.exists():
        return
    store = Store(call.results, Machine(**json.loads(call.machine.read_text())))
    section = PARTS[part][1]
    for key, row in store.rows(section).items():
        if row.get("error") == UNFINISHED and row.get("had", 0.0) >= least:
            store.put(section, key, {"ok": False, "error": why, "code": store.machine.code})


def problem(settings: argparse.Namespace) -> str:
    """What is wrong with the command line, or with where rows are to go; "" if nothing is."""
    for part in settings.parts.split(","):
        if part not in PARTS:
            return f"--parts {part}: one of {', '.join(PARTS)}"
    if not LEAST_SECONDS <= settings.budget <= MOST_SECONDS:  # NaN, too
        return f"--budget {settings.budget:g}: {LEAST_SECONDS:g} to {MOST_SECONDS:g} seconds; less is no row's time"
    if settings.jobs < 1:
        return f"--jobs {settings.jobs}: at least 1"
    if settings.jobs > 1 and not settings.small:
        return f"--jobs {settings.jobs}: parts beside one another disturb each other's figures; only with --small"
    try:
        settings.results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.results):
            pass
    except OSError as error:
        return f"--results {settings.results}: can't be written: {error.strerror}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas, of " + ", ".join(PARTS))
    parser.add_argument("--only", default="", help="measure only rows whose name contains this, such as 'XL/2, plain'")
    parser.add_argument("--small", action="store_true", help="small sizes: a rehearsal that also a CPU can do")
    parser.add_argument("--jobs", type=int, default=1, help="parts at once, with --small (default 1)")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for all of it (default 530)")
    parser.add_argument("--again", action="store_true", help="measure rows that failed once more")
    parser.add_argument("--keep", action="store_true", help="keep rows that an earlier state of the code has measured")
    parser.add_argument(
        "--results", type=Path, default=os.environ.get("OUT"),
        help="where rows are written (default $OUT, or bench/results; with --small its folder rehearsal)",
    )  # fmt: skip
    settings = parser.parse_args(arguments)
    settings.results = settings.results or results.FOLDER / ("rehearsal" * settings.small)
    wrong = problem(settings)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(settings.results, print, "--results"))
        except UserError as error:  # another call writes there
            print(error, file=sys.stderr)
            return 2
        except OSError as error:
            print(f"--results {settings.results}: can't be written: {error.strerror}", file=sys.stderr)
            return 2
        return run_parts(settings)


def run_parts(settings: argparse.Namespace) -> int:
    """The parts that were asked for; the worst of their exit codes."""
    options = [f"--{name}" for name in ("small", "again", "keep") if getattr(settings, name)]
    with tempfile.TemporaryDirectory(prefix="st_fast-day-") as folder:
        until = time.monotonic() + settings.budget
        call = Call(
            (*options, "--only", settings.only), settings.results.absolute(), Path(folder) / "machine.json", until
        )
        parts = settings.parts.split(",")
        if settings.jobs == 1:  # in this thread, the one that Ctrl-C reaches
            codes = [run_part(part, call) for part in parts]
        else:
            with ThreadPoolExecutor(settings.jobs) as pool:
                codes = list(pool.map(lambda part: run_part(part, call), parts))
    return next((code for code in (2, STOPPED, 1) if code in codes), 0)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        raise SystemExit(STOPPED) from None
