"""Starts ranks quickly: one process imports st_fast once and forks real processes that run `st_fast.train`.

`python -m tests.faults.nursery` reads JSON lines: {"start": [arguments], "env": {…}, "output": file} answers with a
process id, {"wait": id} with its exit code (negative: killed by that signal) or null while it runs.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import threading
import traceback
from typing import Any

import torch._dynamo  # noqa: F401

import st_fast.report.html  # with it and the next what a rank imports on its way is there before it is forked
import st_fast.train.run
from st_fast.core.command import run_command
from st_fast.train import __main__ as train
from tests import tiny

vars(st_fast.train.run)["matmul_rate"] = lambda device, dtype: 1e11
tiny.without_figures(setattr)


def child(order: dict[str, Any]) -> None:
    """Becomes a rank; never returns."""
    code = 70
    try:
        out = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(order["env"])
        sys.argv = ["st_fast.train", *order["start"]]
        if "BREAK" in order["env"]:
            runpy.run_module("tests.faults.broken", run_name="__main__")
        else:
            run_command(train.main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for thread in threading.enumerate():  # as an interpreter does that ends: a save under way is finished
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serves until its input ends."""
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            answer: int | None = os.fork()
            if answer == 0:
                child(order)
        else:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
