"""Runs programs as `python -c` does, without the two seconds of each for importing torch: one process has, and forks.

`python -m tests.warm` reads orders as JSON lines, and answers each with the exit code of the process that did it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTEST = "import runpy; runpy.run_module('pytest', run_name='__main__', alter_sys=True)"


@functools.cache
def _server() -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.warm"]
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def run(
    program: str, *arguments: object, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: int = 400
) -> subprocess.CompletedProcess[str]:
    """A process of its own, which has imported torch and nothing else; `env` is all of its environment."""
    server, command = _server(), ["-c", *map(str, arguments)]
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        order = {"program": program, "argv": command, "cwd": str(cwd), "env": dict(os.environ) if env is None else env,
                 "files": list(map(str, files)), "timeout": timeout}  # fmt: skip
        print(json.dumps(order), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def become(order: dict[str, Any]) -> None:
    """What a new interpreter takes from its environment, but for what torch has read of it."""
    signal.alarm(order["timeout"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(order["files"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    path = os.environ.get("PYTHONPATH", "")
    sys.path[:] = ["", *filter(None, path.split(os.pathsep)), *sys.path[1:]]
    sys.argv = order["argv"]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]


if __name__ == "__main__":
    import torch  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            become(json.loads(line))
            exec(compile(json.loads(line)["program"], "<string>", "exec"), {"__name__": "__main__"})
            break
