"""Starts real ranks: under torchrun, or each forked with torchrun's environment and nobody who looks after them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests import tiny

TORCHRUN = Path(sys.executable).with_name("torchrun")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def torchrun(count: int, recipe: Path, *options: str, module: str = "st_fast.train") -> subprocess.Popen[str]:
    """`torchrun -m st_fast.train` with `count` ranks on this machine, in a process group of its own."""
    return subprocess.Popen(
        [str(TORCHRUN), "--standalone", f"--nproc-per-node={count}", "-m", module, str(recipe), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tiny.ROOT, env=os.environ | ONE_THREAD,
        start_new_session=True,
    )  # fmt: skip


@dataclass
class Rank:
    """A forked rank."""

    pid: int
    output: Path
    nursery: Nursery
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative if a signal killed it; None while it runs."""
        if self.code is None:
            self.code = self.nursery.ask({"wait": self.pid})
        return self.code

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


class Nursery:
    """The process that forks ranks (see `nursery.py`)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tiny.ROOT, env=os.environ | ONE_THREAD,
        )  # fmt: skip

    def ask(self, order: dict) -> int | None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, count: int, recipe: Path, *options: str, breaks: dict[str, object] | None = None,
        last: Sequence[str] = (),
    ) -> list[Rank]:  # fmt: skip
        """`count` ranks of one job (1: as without torchrun), with something broken in them (see `broken.py`).

        `last` are options of the last rank alone.
        """
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = str(held.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = []
        for rank in range(count):
            self.started += 1
            output = self.folder / f"output{self.started}.txt"
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            env |= {"BREAK": json.dumps(breaks)} if breaks else {}
            own = last if rank == count - 1 else ()
            pid = self.ask({"start": [str(recipe), *options, *own], "env": env, "output": str(output)})
            assert pid is not None
            found.append(Rank(pid, output, self))
        return found

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def finish(ranks: Sequence[Rank], timeout: float = 90) -> list[int]:
    """The exit codes; a process that outlives the timeout is killed (-9)."""
    end = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.02)
    for rank in ranks:
        with suppress(ProcessLookupError):
            rank.send(signal.SIGKILL)
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    return [rank.code for rank in ranks if rank.code is not None]


def wait_for(condition: Callable[[], bool], timeout: float = 90) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def logged(out: Path, kind: str) -> int:
    """How many records of a kind the run's log holds so far."""
    log = out / "log.jsonl"
    return log.read_text().count(f'"kind": "{kind}"') if log.exists() else 0
