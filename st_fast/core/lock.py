"""One writer a run folder: a lock that is free again when its holder dies, however it dies.

`flock` decides where the file system has it: the kernel releases it, so a holder killed by `kill -9` or a power cut
holds nothing, and the file's text only names the holder. Without `flock` the text decides: the file appears whole, by
a hard link that only one process can make, and is held by a live process, or by any on another host.

Neither believes the other: `flock` fails for a moment, or on one host only, and on some mounts (`localflock`, NFS with
`local_lock`) each host grants it by itself. So who gets it still heeds a text that a live process wrote, and who has it
looks whether the text is still its own.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from st_fast.core.errors import RunFailed, Say, UserError

LOCK_NAME = "run.lock"
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
TRIES = 100
LEFT_OVER = 3_600.0
"""Seconds after which a file of a start counts as left behind by one that was killed."""
_held: set[int] = set()


def _close_in_child() -> None:
    # A forked loader worker that outlives its killed parent must not go on holding the run.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Locked(UserError):
    """Another process writes the folder now."""


class _Held(Exception):
    """The lock is another's, whose record this carries. `remedy`: where nobody here can see whether that one lives."""

    def __init__(self, holder: dict[str, Any], path: Path) -> None:
        super().__init__(_named(holder))
        here = holder.get("host") in (None, socket.gethostname())
        self.remedy = "" if here else f"; if it is no more, remove {path}"


@contextmanager
def run_lock(folder: Path, notice: Say, option: str = "run.out") -> Iterator[Callable[[], None]]:
    """This process alone writes the folder; Locked, a UserError, names the holder if there is another.

    Yields a check to call before something is written: where the file is gone it takes the lock again and tells
    `notice`; RunFailed if another process has it. `notice` also hears of a holder that died. At the end the file is
    removed, and the folder if it was made here and holds nothing. `option` names the folder on the command line.
    """
    with _locked(Path(folder), folder, notice, option) as check:
        yield check


@contextmanager
def turn(path: Path, notice: Say, option: str = "run.out") -> Iterator[None]:
    """This process alone makes what will be at `path`; Locked, a UserError, names the holder if there is another.

    The lock lies in a hidden folder beside it, and leaves nothing: the last of those that held it or were refused
    removes that folder, whichever of them made it.
    """
    place = path.with_name(f".{path.name}.taken")
    try:
        with _locked(place, path, notice, option):
            yield
    finally:
        with suppress(OSError):  # another's lock is in it
            place.rmdir()


@contextmanager
def _locked(folder: Path, named: Path, notice: Say, option: str) -> Iterator[Callable[[], None]]:
    lock = _Lock(folder / LOCK_NAME, notice)
    made = _make(lock.path.parent, lock.path)
    try:
        try:
            lock.take()
        except _Held as other:
            raise Locked(
                f"{named}: another run is writing here ({other}); stop it or give another {option}{other.remedy}"
            ) from None
        except OSError as error:
            raise UserError(f"{lock.path}: cannot be locked ({error.strerror})") from error
        try:
            yield lock.check
        finally:
            lock.release()
    finally:
        for one in made:
            with suppress(OSError):  # something is in it
                one.rmdir()


def _make(folder: Path, path: Path) -> list[Path]:
    """Makes a folder; which ones were missing, the innermost first."""
    try:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened for writing ({error.strerror})") from error
    return missing


class _Lock:
    """The lock at a path, by `flock` or, where there is none, by its text."""

    def __init__(self, path: Path, notice: Say) -> None:
        self.path, self._notice = path, notice
        self._descriptor: int | None = None
        self._text = b""
        """Of the holder, once it is this process."""
        self._there = b""
        """What the file holds since: that, or on a full disk less."""

    def take(self) -> None:
        """Takes the lock; _Held if another has it."""
        this = {
            "pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": " ".join(sys.argv)[:200], "id": uuid.uuid4().hex,
        }  # fmt: skip
        text, by_text = json.dumps(this).encode(), json.dumps(this | {"flock": False}).encode()
        for left in range(TRIES, -1, -1):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                by_flock = self._has_flock() and self._flock(text)
                if not by_flock:
                    _claim(self.path, by_text, self._notice)
                break
            except FileNotFoundError:  # who was refused here has just removed the folder it had made
                if not left:
                    raise
        self._text = text if by_flock else by_text
        self._sweep()

    def _sweep(self) -> None:
        """Removes what starts that were killed have left beside the lock, which this process holds.

        A live one that has stood still for so long finds its file gone, and tries again (see `take`). The right to
        replace a dead holder's text is worth nothing any more: the file has this process's.
        """
        with suppress(OSError):
            now = self.path.stat().st_mtime  # by the file server's clock
            for pattern in (f".{LOCK_NAME}.*", f"{LOCK_NAME}.after-*"):
                for left in self.path.parent.glob(pattern):
                    with suppress(OSError):  # a folder of that name, which is nobody's, hides no other
                        if now - left.lstat().st_mtime > LEFT_OVER:
                            left.unlink()

    def _has_flock(self) -> bool:
        """Whether the file system has it, tried on a file of another name: no lock that nobody holds stays."""
        probe = self.path.with_name(f".{LOCK_NAME}.{uuid.uuid4().hex}")
        descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise
        finally:
            os.close(descriptor)
            with suppress(OSError):
                probe.unlink()
        return True

    def _flock(self, text: bytes) -> bool:
        """Takes the lock by `flock`; False where the file system has none."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._is_at_path(descriptor):  # its last holder has just removed it
                    os.close(descriptor)
                    continue
                if holder := _record(os.pread(descriptor, 4096, 0)):
                    if _holds_beside_flock(holder):
                        raise _Held(holder, self.path)
                    _tell_dead(self.path, holder, self._notice)
                with suppress(OSError):  # on a full disk the holder has no name
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, text, 0)
                    os.fsync(descriptor)
                self._there = os.pread(descriptor, 4096, 0)
            except BlockingIOError:
                holder = _record(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise _Held(holder, self.path) from None
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NO_FLOCK:
                    return False
                raise
            except BaseException:
                os.close(descriptor)
                raise
            _held.add(descriptor)
            self._descriptor = descriptor
            return True

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the open file is the one that has the lock's name."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(os.fstat(descriptor), there)

    def _ours(self) -> bool:
        if self._descriptor is not None:
            if not self._is_at_path(self._descriptor):
                return False
            there = os.pread(self._descriptor, 4096, 0)
            if there not in (self._text, self._there) and "id" in (holder := _record(there)):
                raise _Held(holder, self.path)  # flock excludes nobody here
            return True
        return bool(self._text) and _read(self.path) == self._text

    def check(self) -> None:
        """RunFailed if another has the lock by now; if nobody has, takes it again. Errors of storage say nothing."""
        try:
            if self._ours():
                return
            self._let_go()
            self.take()
        except _Held as other:
            raise RunFailed(
                f"{self.path} was removed or taken, and another run is writing here now ({other}); "
                "this one writes nothing more"
            ) from None
        except OSError:
            return
        self._notice(f"{self.path} was removed while this run was writing here; it was made again")

    def release(self) -> None:
        """Removes the file, if it is still this process's: whoever has it open sees that it has no name any more."""
        forked = self._descriptor is not None and self._descriptor not in _held
        if self._text and not forked:
            with suppress(OSError, _Held):
                if self._ours():
                    self.path.unlink()
        self._let_go()

    def _let_go(self) -> None:
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor, self._text = None, b""


def _claim(path: Path, text: bytes, notice: Say) -> None:
    """Makes the file with this text, unless a live holder has it (_Held): of any number that try, one succeeds.

    Who replaces a dead holder's file must hold another lock, named after that holder's text: while the file has that
    text, only its holder may replace it.
    """
    mine = path.with_name(f".{LOCK_NAME}.{uuid.uuid4().hex}")
    try:
        mine.write_bytes(text)
        while True:
            try:
                os.link(mine, path)
                return
            except FileExistsError:
                if mine.stat().st_nlink == 2:  # a repeated request on a network
                    return
            there = _read(path)
            if there is None:
                continue
            holder = _record(there)
            if _still_runs(holder):
                raise _Held(holder, path)
            right = path.with_name(f"{LOCK_NAME}.after-{hashlib.sha256(there).hexdigest()[:16]}")
            _claim(right, text, notice)
            try:
                if _read(path) == there:
                    os.replace(mine, path)
                    if holder:
                        _tell_dead(path, holder, notice)
                    return
            finally:
                right.unlink()
    finally:
        with suppress(OSError):
            mine.unlink()


def _read(path: Path) -> bytes | None:
    """A lock file's text; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _record(text: bytes) -> dict[str, Any]:
    """A lock file's text about its holder; {} if there is none, {"pid": "unknown"} if it is damaged."""
    if not text.strip(b"\0 \n"):
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {"pid": "unknown"}


def process_start(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None if it does not run, or no more.

    A killed process whose parent never asks how it ended keeps its number, in a container without init for ever.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # from field 3; the command in parentheses may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _still_runs(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or type(holder.get("pid")) is not int:
        return bool(holder)
    start = process_start(holder["pid"])
    return start is not None and start == holder.get("start")


def _holds_beside_flock(holder: dict[str, Any]) -> bool:
    """Whether a text says that its writer has the lock, though `flock` was free for this process."""
    if holder.get("host") == socket.gethostname():
        return holder.get("pid") != os.getpid() and _still_runs(holder)
    return holder.get("flock") is False


def _tell_dead(path: Path, holder: dict[str, Any], notice: Say) -> None:
    notice(f"{path.parent}: taken over from a run that ended without cleaning up ({_named(holder)})")


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "which has not yet written its name"
    parts = [f"{word} {holder[key]}" for key, word in (("host", "on"), ("since", "since")) if key in holder]
    return ascii(" ".join([f"process {holder.get('pid')}", *parts]))[1:-1][:200]
