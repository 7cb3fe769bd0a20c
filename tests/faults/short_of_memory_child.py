"""Trains a recipe in a process that may take only LEFT more bytes from its first step on; arguments: LEFT RECIPE …"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from st_fast.core.command import run_command
from st_fast.train import __main__ as train
from st_fast.train.step import Step


def main() -> None:
    """The trainer; its limit on address space is lowered once."""
    left, arguments, call = int(sys.argv[1]), sys.argv[2:], Step.__call__

    def limited(this: Step, step: int, batches):
        Step.__call__ = call
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + left, resource.RLIM_INFINITY))
        return call(this, step, batches)

    Step.__call__ = limited
    run_command(train.main, arguments)


if __name__ == "__main__":
    main()
