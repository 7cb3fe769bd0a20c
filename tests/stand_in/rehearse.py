"""Runs a command of the repository on the stand-in, without the checks that compare numbers.

    python -m tests.stand_in.rehearse bench --small --results /tmp/day
    python -m tests.stand_in.rehearse --gib 40 --fail-after 100000 bench --small
    python -m tests.stand_in.rehearse pytest tests/train/schedule/test_gpu.py
    python -m tests.stand_in.rehearse bench/day.sh 1                 a script, with that Python as its $PYTHON

Every process that the command starts is part of the rehearsal. Rows go to a new folder unless the command or $OUT
names one, so that none is taken for a measurement. The exit code is the command's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.stand_in import driver, gates

START = Path(__file__).resolve().parent / "start"


def variables(found: driver.Installation, gates: bool = True, **settings: float | None) -> dict[str, str]:
    """The whole environment of a rehearsal: this process's own, the stand-in's, and what disarms the gates.

    With `gates` False they stay. Raises Unavailable.
    """
    paths = (*([str(START)] if gates else []), str(driver.ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))
    more = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {**os.environ, **driver.environment(found, **settings), **more}


def run(module: str, arguments: list[str]) -> None:
    """Runs the module as a command, in this process. One that has gates is imported, since `-m` would skip these."""
    sys.argv = [module, *arguments]
    if module in gates.GATES:
        sys.exit(importlib.import_module(module).main())
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stand_in.rehearse", description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, help="the device's memory (79.1)")
    parser.add_argument("--fail-after", type=int, default=0, help="launches until the device fails (0: never)")
    parser.add_argument("--event-ms", type=float, help="time between two events (1)")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if driver.inside():
        run(given.module, given.arguments)
        return 0
    try:
        found = driver.installation()
        environment = variables(found, gib=given.gib, fail_after=given.fail_after, event_ms=given.event_ms)
    except driver.Unavailable as error:
        print(f"stand-in CUDA: {error}", file=sys.stderr)
        return 2
    environment.setdefault("OUT", tempfile.mkdtemp(prefix="st_fast-rehearsal-"))
    print(f"rehearsal by {found.python}: rows go to {environment['OUT']}", file=sys.stderr)
    script = given.module.endswith(".sh")
    start = ["bash", given.module] if script else [found.python, "-m", "tests.stand_in.rehearse", given.module]
    command, environment = [*start, *given.arguments], environment | {"PYTHON": found.python}
    return subprocess.run(command, cwd=driver.ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
