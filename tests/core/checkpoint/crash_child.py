"""Run by test_checkpoint_crash: kills a process at every file operation of a save in turn, for real.

`python -m tests.core.checkpoint.crash_child BASE WORK SCENARIO` copies BASE to WORK/<n> and forks a child that does
what SCENARIO says there and sends itself SIGKILL at its n-th operation, for n = 1, 2, … until a child lives through it.
Prints one line for each child: n and the operation it died at, or "done".
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from st_fast.core.checkpoint import Team, groups, save, together
from st_fast.core.checkpoint.store import SaveFailed, prune
from tests.core.checkpoint.sharded import pieces

OPERATIONS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir")


def filled(value: int) -> dict[str, dict[str, torch.Tensor]]:
    """A state that consists of one value everywhere; the large tensor takes several pieces."""
    large = torch.full((150,), value, dtype=torch.uint8)
    return {"model": {"a": torch.full((3, 4), float(value)), "large": large}, "ema": {"b": torch.tensor(value)}}


def save_again(root: Path) -> None:
    save(root, 2, filled(3), {"value": 3})


def save_and_prune(root: Path) -> None:
    save(root, 3, filled(3), {"value": 3})
    prune(root, keep=1)


class FileLetters:
    """Letters between two processes, without any of the operations that are counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, key: str, letter: str) -> None:
        name = self.folder / key.replace("/", "-")
        name.with_suffix(f".{os.getpid()}").write_text(letter)
        os.link(name.with_suffix(f".{os.getpid()}"), name)

    def read(self, key: str) -> str | None:
        name = self.folder / key.replace("/", "-")
        return name.read_text() if name.exists() else None


def save_together(root: Path, fatal: int, victim: int) -> int:
    """Two ranks save and prune; the victim dies at its `fatal`-th operation. Returns how it ended, as os.wait does."""
    mail = root.with_name(f"{root.name}-mail")
    mail.mkdir()
    gone = mail / "gone"
    vars(together)["PATIENCE"] = 0.01
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            team = Team(rank, 2, FileLetters(mail), "t", over=gone.exists)
            if rank == victim:
                arm(fatal)
            with suppress(SaveFailed):
                if team.save(root, 3, *pieces(filled(3), rank, 2), {"value": 3}) and team.first:
                    prune(root, keep=1)
            os._exit(0)
        children.append(child)
    _, status = os.waitpid(children[victim], 0)
    gone.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(children[1 - victim], 0)[1]) == 0
    return status


def save_alone(root: Path, fatal: int, scenario: str) -> int:
    """The same of one process."""
    child = os.fork()
    if child == 0:
        arm(fatal)
        SCENARIOS[scenario](root)
        os._exit(0)
    return os.waitpid(child, 0)[1]


TOGETHER = {"first": 0, "second": 1}
SCENARIOS: dict[str, Callable[[Path], None]] = {
    "new": save_again, "again": save_again, "prune": save_and_prune
}  # fmt: skip


def arm(fatal: int) -> None:
    """Makes this process die at its `fatal`-th operation: before each, and for a write also half-way through it."""
    counter = itertools.count(1)
    real = {name: getattr(os, name) for name in OPERATIONS}

    def strike(what: str) -> None:
        if next(counter) == fatal:
            real["write"](1, f"{fatal} {what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            strike(name)
            return real[name](*arguments, **options)

        return operation

    def deadly_write(descriptor: int, data: bytes) -> int:
        strike("write")
        half = real["write"](descriptor, memoryview(data)[: (len(data) + 1) // 2])
        strike("half-write")
        return int(half)

    for name in OPERATIONS:
        setattr(os, name, deadly_write if name == "write" else deadly(name))


def main(base: Path, work: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    vars(groups)["CHUNK"] = 64
    for number in itertools.count(1):
        root = work / f"{number:03d}"
        shutil.copytree(base, root)
        if scenario in TOGETHER:
            status = save_together(root, number, TOGETHER[scenario])
        else:
            status = save_alone(root, number, scenario)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            print(f"{number} done", flush=True)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
