"""One writer a run folder: a lock that the kernel releases when its holder dies, however it dies."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from st_fast.core.errors import UserError

LOCK_NAME = "run.lock"
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_held: set[int] = set()


def _close_in_child() -> None:
    # A forked loader worker that outlives its killed parent must not go on holding the run.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def run_lock(folder: Path, notice: Callable[[str], None], option: str = "run.out") -> Iterator[None]:
    """This process alone writes the folder; a UserError names the holder if there is another.

    `flock` decides, so a holder killed by `kill -9` or a power cut holds nothing; the file's text only names it. Text
    left by a holder that never released the lock is reported to `notice` and overwritten. On a file system without
    `flock` the text decides: a live process, or any on another host, holds the lock. The (empty) file stays; removing
    it would race with a process that has just opened it. `option` names the folder on the command line.
    """
    path = Path(folder) / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from error
    try:
        _take(descriptor, path, notice, option)
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked child, where it was closed
            os.ftruncate(descriptor, 0)
            _held.discard(descriptor)
            os.close(descriptor)


def _take(descriptor: int, path: Path, notice: Callable[[str], None], option: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except BlockingIOError:
        held = True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise UserError(f"{path}: cannot be locked ({error.strerror})") from error
        held = _still_runs(_holder(descriptor))
    holder = _holder(descriptor)
    if held:
        who = f"another run is writing here ({_named(holder)})"
        raise UserError(f"{path.parent}: {who}; stop it or give another {option}")
    if holder:
        notice(f"{path.parent}: taken over from a run that ended without cleaning up ({_named(holder)})")
    this = {
        "pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": " ".join(sys.argv)[:200],
    }  # fmt: skip
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(this).encode(), 0)
    os.fsync(descriptor)


def process_start(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22; the command in parentheses may hold anything


def _holder(descriptor: int) -> dict[str, Any]:
    """The lock file's text about its holder; {} if there is none, {"pid": "unknown"} if it is damaged."""
    text = os.pread(descriptor, 4096, 0)
    if not text.strip(b"\0 \n"):
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {"pid": "unknown"}


def _still_runs(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or type(holder.get("pid")) is not int:
        return bool(holder)
    start = process_start(holder["pid"])
    return start is not None and start == holder.get("start")


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "which has not yet written its name"
    parts = [f"{word} {holder[key]}" for key, word in (("host", "on"), ("since", "since")) if key in holder]
    return ascii(" ".join([f"process {holder.get('pid')}", *parts]))[1:-1][:200]
