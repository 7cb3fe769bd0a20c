"""Measures st_fast: all parts or some, by one command that can be run again until it is done.

    python -m bench                          the figures of the README's tables, about nine minutes on two cores
    python -m bench step loading             some parts; --list names them all
    python -m bench sweep --seconds 220      for at most so long; the same command again goes on where it stopped
    python -m bench ops --only norm_modulate rows whose name contains this
    python -m bench --full                   more sizes, rivals and rounds, and the sweep: an hour or so
    python -m bench --small --jobs 2         every part of a GPU day, at sizes that a CPU does in minutes: a rehearsal
    python -m bench --base main              only: is any op slower than at that revision?

Each part is a process of its own, which is started again where the device or the process breaks. Rows are written as
they are measured, to $OUT or bench/results, and not measured again while the sources stay (with --keep: at all). Exit
code: 0 done, 1 a row is wrong or failed or slower than the base, 2 nothing could be started, 3 not done.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import compare, machine
from bench.machine import Machine, Store
from bench.suite import BROKEN, LEAST_SECONDS, LONGEST_ROW, PARTS, STOPPED, UNFINISHED, defaults, named_file
from st_fast.core.errors import UserError
from st_fast.core.lock import run_lock

GRACE = 15.0
"""Seconds over its time that a part has to stop by itself before it is killed."""
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

    @property
    def store(self) -> Store:
        """Of its rows, once a part has found out about the machine."""
        return Store(self.results, Machine(**json.loads(self.machine.read_text())))


def run_part(part: str, call: Call, only: Sequence[str] = ()) -> int:
    """Runs a part, or its rows of these names, to its end, as often as it has to be started; its exit code."""
    more = [option for name in only for option in ("--only", name)]
    for _ in range(MOST_STARTS):
        if call.left < LEAST_SECONDS:
            print(f"stopped before {part}; run the same command again", flush=True)
            return STOPPED
        code, ended = _start(part, call, more)
        if code in (0, 1, 2, STOPPED):
            return code
        _give_up_row(part, call, ended)
        print(f"{part}: {ended}; goes on in a new process", flush=True)
    print(f"{part}: given up after {MOST_STARTS} starts", flush=True)
    return 1


def _start(part: str, call: Call, more: Sequence[str]) -> tuple[int, str]:
    """One process of a part, killed with all that it started when it outstays its time; its exit code, and in words."""
    command = [sys.executable, "-m", "bench.suite", part, "--machine", str(call.machine), *call.options, *more]
    command += ["--results", str(call.results), "--seconds", f"{call.left:.1f}"]
    process = subprocess.Popen(command, cwd=machine.ROOT, process_group=0)
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
    store, section = call.store, PARTS[part].section
    for key, row in store.rows(section).items():
        if row.get("error") == UNFINISHED and row.get("had", 0.0) >= least:
            store.put(section, key, {"ok": False, "error": why, "code": store.machine.code})


def problem(settings: argparse.Namespace) -> str:
    """What is wrong with the command line, or with where rows are to go; "" if nothing is."""
    for part in settings.parts:
        if part not in PARTS:
            return f"{part}: no such part; one of {', '.join(PARTS)}"
    if not LEAST_SECONDS <= settings.seconds <= MOST_SECONDS:  # NaN, too
        return f"--seconds {settings.seconds:g}: {LEAST_SECONDS:g} to {MOST_SECONDS:g}; less is no row's time"
    if settings.small and settings.full:
        return "--small --full: one of them"
    if settings.base and (settings.parts not in ([], ["ops"]) or settings.small or settings.full):
        return "--base: compares the ops at their default sizes, and measures nothing else"
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("parts", nargs="*", metavar="PART", help="which parts (default: those that --list marks)")
    made.add_argument("--list", action="store_true", help="name the parts and what they measure; measure nothing")
    made.add_argument("--only", action="append", default=[], help="only rows whose name contains this; may be repeated")
    made.add_argument("--full", action="store_true", help="more sizes, rivals and rounds, and the sweep")
    made.add_argument("--small", action="store_true", help="small sizes: a rehearsal that also a CPU can do")
    made.add_argument("--seconds", type=float, default=MOST_SECONDS, help="after so long the call is over")
    made.add_argument("--base", metavar="REV", help="compare the ops with this revision; 1 beyond the noise")
    made.add_argument("--again", action="store_true", help="also rows that failed, or that a busy machine measured")
    made.add_argument("--keep", action="store_true", help="keep rows that an earlier state of the code has measured")
    made.add_argument("--jobs", type=int, default=1, help="parts at once, with --small (default 1)")
    made.add_argument(
        "--results", type=Path, default=os.environ.get("OUT"),
        help="where rows are written (default $OUT, or bench/results; with --small its folder rehearsal)",
    )  # fmt: skip
    return made


def settings_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's; its results folder where none is named, too."""
    settings = parser().parse_args(arguments)
    settings.results = settings.results or machine.FOLDER / ("rehearsal" * settings.small)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    settings = settings_of(arguments)
    unasked = defaults(machine.device_kind(), settings.small, settings.full)
    if settings.list:
        for name, part in PARTS.items():
            print(f"{'*' if name in unasked else ' '} {name:16} {part.about}")
        print("* is measured unasked on this machine")
        return 0
    wrong = problem(settings)
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    with ExitStack() as held:
        try:
            held.enter_context(run_lock(settings.results, print, "--results"))
            if settings.base:
                return compare.report(settings.base)
        except (UserError, ValueError) as error:  # another call writes there; no such revision
            print(error, file=sys.stderr)
            return 2
        except OSError as error:
            print(f"--results {settings.results}: can't be written: {error.strerror}", file=sys.stderr)
            return 2
        call = held.enter_context(started(settings))
        return run_parts(settings.parts or unasked, call, settings)


@contextmanager
def started(settings: argparse.Namespace) -> Iterator[Call]:
    """A call with these options, its time running from now on."""
    options = tuple(f"--{name}" for name in ("small", "full", "again", "keep") if getattr(settings, name))
    with tempfile.TemporaryDirectory(prefix="st_fast-bench-") as folder:
        until = time.monotonic() + settings.seconds
        yield Call(options, settings.results.absolute(), Path(folder) / "machine.json", until)


def run_parts(parts: Sequence[str], call: Call, settings: argparse.Namespace) -> int:
    """Runs these parts; the worst of their exit codes."""
    if settings.jobs == 1:  # in this thread, the one that Ctrl-C reaches
        codes = [run_part(part, call, settings.only) for part in parts]
    else:
        with ThreadPoolExecutor(settings.jobs) as pool:
            codes = list(pool.map(lambda part: run_part(part, call, settings.only), parts))
    file = named_file(call.machine)
    named = file.read_text().splitlines() if file.exists() else []
    nothing = [name for name in settings.only if name not in named]
    if nothing and not {2, STOPPED} & {*codes}:  # a part that was stopped has not seen all its rows
        print(f"--only {' '.join(nothing)}: no row of {', '.join(parts)} has that in its name", file=sys.stderr)
        return 2
    return next((code for code in (2, STOPPED, 1) if code in codes), 0)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        raise SystemExit(STOPPED) from None
