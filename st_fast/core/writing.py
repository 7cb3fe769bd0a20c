"""What a run writes while it trains, other than checkpoints, and what commands write by a library's hand.

The log, pictures, recipe.toml and the report: a file system that refuses (full, over quota, read-only, gone, a limit on
a file's size, an input/output error) costs a line and never the training. What could not be written waits in memory, at
most ROOM bytes of it, and is written in its order as soon as the file system takes it again; what does not fit is
dropped, oldest first, and counted. Imports no torch.
"""

import errno
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from st_fast.core.errors import RunFailed, Say, UserError
from st_fast.core.files import CHUNK, keep_special, make_folder, write_all, write_atomic

ROOM = 64 * 2**20
"""Bytes that may wait; a line of the log has about 400, so a full disk may last 100,000 of them."""
RETRY = 5.0
"""Seconds until a file system that refused is tried again."""


WRONG_PLACE = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
"""What is wrong with a name or its rights; anything else is wrong with the file system."""


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to raise where `path` could not be written: a UserError for a wrong place, RunFailed for a full disk."""
    kind = UserError if error.errno in WRONG_PLACE else RunFailed
    return kind(f"{path}: can't be written: {error.strerror or error}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name beside `path`, to write to: at the end the file is `path`; after an error nothing of it is left.

    `cannot_write`'s errors where the file system refuses. Durable only as far as what is inside fsyncs.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        keep_special(path)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_pretrained(model: Any, folder: Path) -> None:
    """A diffusers or transformers model's own, as safetensors; RunFailed on a full disk, not their own error."""
    try:
        model.save_pretrained(folder, safe_serialization=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    except SafetensorError as error:
        raise RunFailed(f"{folder}: can't be written: {error}") from error


@dataclass(frozen=True)
class Waiting:
    """Bytes that are to be a file's content or, with `line`, to be appended to it."""

    path: Path
    data: bytes
    line: bool


class Writer:
    """Writes a run's files in the order given; never raises OSError. For one thread.

    `say` gets one line when a file can't be written and one when nothing is missing any more. `guard` is asked before
    anything is written, and may raise: whether the folder is still this run's.
    """

    def __init__(self, say: Say) -> None:
        self.guard: Callable[[], None] = lambda: None
        self._say = say
        self._waiting: deque[Waiting] = deque()
        self._bytes = 0
        self._dropped: Counter[Path] = Counter()
        self._troubled: set[Path] = set()
        self._torn: set[Path] = set()
        self._next_try = 0.0

    def append(self, path: Path, line: str) -> None:
        """Adds a line (with its newline) to a file, of which no crash and no full disk leaves half in its middle."""
        self._add(Waiting(path, line.encode(), True))

    def write(self, path: Path, data: bytes) -> None:
        """Writes a whole file: after any crash the old one or the new one is there."""
        self._add(Waiting(path, data, False))

    def mend(self, path: Path) -> None:
        """Drops half a line that a killed process has left at a file's end, now or before the next line is written."""
        self._torn.add(path)
        self._try(path, lambda: self._drop_half_a_line(path))

    @property
    def missing(self) -> dict[Path, int]:
        """How many lines or files of each path have not been written, those that were dropped included."""
        return dict(self._dropped + Counter(one.path for one in self._waiting))

    def close(self) -> bool:
        """Tries once more to write all that waits; False, and a line that names what is missing, if it can't."""
        self._flush()
        if missing := self.missing:
            counts = ", ".join(f"{path} ({count})" for path, count in missing.items())
            self._say(f"could not be written: {counts}; checkpoints are not affected")
        return not missing

    def _add(self, one: Waiting) -> None:
        self._waiting.append(one)
        self._bytes += len(one.data)
        if not self._troubled or time.monotonic() >= self._next_try:
            self._flush()
        while self._bytes > ROOM:
            dropped = self._waiting.popleft()
            self._bytes -= len(dropped.data)
            self._dropped[dropped.path] += 1

    def _flush(self) -> None:
        self.guard()
        refused: set[Path] = set()
        kept: deque[Waiting] = deque()
        for one in self._waiting:
            work = self._append if one.line else self._write
            if one.path in refused or not self._try(one.path, lambda one=one, work=work: work(one)):  # type: ignore[misc]
                refused.add(one.path)
                kept.append(one)
        self._waiting, self._bytes = kept, sum(len(one.data) for one in kept)
        if refused:
            self._next_try = time.monotonic() + RETRY
        elif self._troubled:
            dropped = sum(self._dropped.values())
            lost = f", but for {dropped} lines and files for which there was no room in memory" if dropped else ""
            self._say(f"{', '.join(map(str, sorted(self._troubled)))}: written again, nothing is missing{lost}")
        self._troubled = refused

    def _try(self, path: Path, work: Callable[[], None]) -> bool:
        """Whether it could be done; otherwise one line, the first time."""
        try:
            work()
        except OSError as error:
            if path not in self._troubled:
                self._troubled.add(path)
                self._say(f"{path}: cannot be written ({error.strerror or error}); training goes on, it is tried again")
            return False
        return True

    def _append(self, one: Waiting) -> None:
        if one.path in self._torn:
            self._drop_half_a_line(one.path)
        with _open_to_append(one.path) as (file, end):
            try:
                write_all(file, one.data)
            except OSError:
                self._torn.add(one.path)
                os.ftruncate(file, end)
                self._torn.discard(one.path)
                raise

    @staticmethod
    def _write(one: Waiting) -> None:
        make_folder(one.path.parent)
        write_atomic(one.path, one.data)

    def _drop_half_a_line(self, path: Path) -> None:
        if path.is_file():
            with path.open("rb") as file:
                end = whole = os.fstat(file.fileno()).st_size
                while whole:  # from the end, as far as the last newline
                    start = max(0, whole - CHUNK)
                    file.seek(start)
                    at = file.read(whole - start).rfind(b"\n")
                    whole = start + at + 1 if at >= 0 else start
                    if at >= 0:
                        break
            if whole < end:
                os.truncate(path, whole)
        self._torn.discard(path)


@contextmanager
def _open_to_append(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor at a file's end, and where that is; makes the file, and its folder if that is gone."""
    # O_NONBLOCK: a pipe in the file's place must not hang; it means nothing to a regular file.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file = os.open(path, flags, 0o666)
    except FileNotFoundError:
        make_folder(path.parent)
        file = os.open(path, flags, 0o666)
    try:
        yield file, os.fstat(file).st_size
    finally:
        os.close(file)
