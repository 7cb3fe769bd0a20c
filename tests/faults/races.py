"""Many processes that want one run folder or turn at the same moment, again and again: how often just one had it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from st_fast.core.errors import Say, UserError
from st_fast.core.lock import LOCK_NAME, run_lock, turn

Lock = Callable[[Path, Say], AbstractContextManager[object]]


def without_flock(*_: object) -> None:
    """In `fcntl.flock`'s place: what a file system without locks says."""
    raise OSError(errno.ENOLCK, "No locks available")


def leave_a_dead_holder(folder: Path) -> None:
    """The lock file of a process that is no more."""
    dead = {"pid": 2**22 + 1, "host": socket.gethostname(), "start": 1, "id": random.random()}
    (folder / LOCK_NAME).write_text(json.dumps(dead))


def races(folder: Path, times: int, flock: bool, rivals: int = 4) -> list[int]:
    """How many of the rivals were inside at once, for each of so many tries; the folder is new, used or a dead run's.

    Everyone inside stays until all have tried. -1: somebody ended otherwise than by being let in or refused.
    """
    found = []
    for number in range(times):
        place = folder / f"{number}"
        if number % 3:
            place.mkdir()
        if number % 3 == 2:
            leave_a_dead_holder(place)
        found.append(_race(place, flock, rivals))
        if (place / LOCK_NAME).exists() or (place.exists() and list(place.iterdir())):
            found[-1] = -1  # something was left behind
    return found


def turns(folder: Path, times: int, flock: bool, rivals: int = 4) -> list[int]:
    """The same for turns at making a file; -1 also where anything is left, whoever of them made it."""
    found = []
    for number in range(times):
        if number % 3:
            (place := folder / f".{number}.taken").mkdir()
            if number % 3 == 2:
                leave_a_dead_holder(place)
        found.append(_race(folder / f"{number}", flock, rivals, turn))
        if list(folder.iterdir()):
            found[-1] = -1
    return found


def _race(place: Path, flock: bool, rivals: int, lock: Lock = run_lock) -> int:
    start_reads, start_writes = os.pipe()
    told_reads, told_writes = os.pipe()
    over_reads, over_writes = os.pipe()
    children = []
    for _ in range(rivals):
        child = os.fork()
        if child == 0:
            for descriptor in (start_writes, told_reads, over_writes):
                os.close(descriptor)
            _rival(place, flock, lock, (start_reads, told_writes, over_reads))
        children.append(child)
    for descriptor in (start_reads, told_writes, over_reads):
        os.close(descriptor)
    os.close(start_writes)  # now
    told = b""
    while len(told) < rivals and (more := os.read(told_reads, rivals)):
        told += more
    os.close(over_writes)
    for child in children:
        os.waitpid(child, 0)
    os.close(told_reads)
    return told.count(b"i") if len(told) == rivals and not told.strip(b"io") else -1


def _rival(place: Path, flock: bool, lock: Lock, pipes: tuple[int, int, int]) -> None:
    """A process that wants in; never returns."""
    start, told, over = pipes
    try:
        if not flock:
            fcntl.flock = without_flock  # type: ignore[assignment]
        os.read(start, 1)
        try:
            with lock(place, lambda line: None):
                os.write(told, b"i")
                os.read(over, 1)
        except UserError:
            os.write(told, b"o")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
