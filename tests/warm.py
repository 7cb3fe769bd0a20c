"""Programs in processes of their own that begin with torch imported: each is a fork of one that has nothing else.

`start` and `run` stand for `subprocess.Popen` and `subprocess.run` where a test starts Python and the import of torch,
two seconds of processor time, is not what it is about. Flags of the interpreter and `OMP_NUM_THREADS` are not heeded.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTEST = "import runpy; runpy.run_module('pytest', run_name='__main__', alter_sys=True)"
"""`-m pytest` as a program, for `-c`."""


class Process:
    """A program that was started. Signals go to `pid`."""

    def __init__(self, words: Sequence[str], cwd: Path | str, env: Mapping[str, str] | None, merged: bool) -> None:
        self.args, self.returncode = list(words), None
        self.streams = [_file(), _file()]
        if merged:
            self.streams[1] = self.streams[0]
        order = {"words": self.args, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        self.pid = _ask(order | {"streams": list(map(str, self.streams))})

    @property
    def text(self) -> str:
        """What it has written to stdout so far."""
        return self.streams[0].read_text()

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"wait": self.pid})
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended. TimeoutExpired, and its end, after `timeout` s."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, 9)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        out, err = (stream.read_text() for stream in self.streams)
        for stream in self.streams:
            stream.unlink(missing_ok=True)
        return out, err


def start(
    *words: object, cwd: Path | str = ROOT, env: Mapping[str, str] | None = None, merged: bool = False
) -> Process:
    """`python WORDS` (`-c` program, `-m` module or a file, then its arguments). merged: both streams are one."""
    return Process(list(map(str, words)), cwd, env, merged)


def run(
    *words: object,
    cwd: Path | str = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The same, once it has ended."""
    process = start(*words, cwd=cwd, env=env)
    done = subprocess.CompletedProcess(process.args, 0, *process.communicate(timeout))
    done.returncode = process.returncode
    if check:
        done.check_returncode()
    return done


def _file() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="warm-")
    os.close(descriptor)
    return Path(name)


@cache
def _forker() -> subprocess.Popen[str]:
    """Ends when this process does, for its input ends."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=clean | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _ask(order: dict[str, Any]) -> Any:
    forker = _forker()
    assert forker.stdin and forker.stdout
    forker.stdin.write(json.dumps(order) + "\n")
    forker.stdin.flush()
    return json.loads(forker.stdout.readline())


def become(words: Sequence[str], cwd: str, env: Mapping[str, str], streams: Sequence[str]) -> Sequence[str]:
    """Takes what a new interpreter would; `-c`, `-m` or nothing, and what it is to run."""
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in enumerate((null, *(os.open(name, os.O_WRONLY | os.O_APPEND) for name in streams))):
        os.dup2(source, number)
        os.close(source)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    kind, program, *arguments = words if words[0] in ("-c", "-m") else ("", *words)
    first = {"-c": "", "-m": cwd, "": str(Path(program).resolve().parent)}[kind]
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.argv = ["-c" if kind == "-c" else program, *arguments]
    importlib.invalidate_caches()
    return kind, program


def serve() -> Sequence[str] | None:
    """Answers orders: a process id for a program, an exit code or null for a wait. In the new process: what to run."""
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return become(**order)
        print(json.dumps(answer), flush=True)
    return None


if __name__ == "__main__":
    import torch  # noqa: F401

    gc.collect()
    gc.freeze()
    if found := serve():  # and from here on it ends as any interpreter does
        kind, program = found
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            before, main = sys.modules["__main__"], ModuleType("__main__")  # what is run from stays alive
            sys.modules["__main__"] = main
            exec(compile(program, "<string>", "exec"), vars(main))
        else:
            runpy.run_path(program, run_name="__main__")
