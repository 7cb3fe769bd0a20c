"""Writing so that no crash shows half: aside, fsynced, renamed, and the folder that holds the name fsynced too.

All writes go through `os.write`, `os.fsync` and `os.rename`, so that a test can stop a process at each of them.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from st_fast.core.errors import UserError
from st_fast.core.files.reading import CHUNK


def write_all(descriptor: int, data: memoryview | bytes) -> None:
    """Writes all bytes, in pieces that the file system may split."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view[:CHUNK]) :]


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, durably."""
    path = Path(path).absolute()
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


@contextmanager
def durable_file(path: Path) -> Iterator[int]:
    """A new file's descriptor for `write_all`; fsynced at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(obj: object) -> bytes:
    """Readable JSON in UTF-8; NaN, infinities and halves of surrogate pairs are a ValueError."""
    return (json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_json_atomic(path: Path, obj: object) -> None:
    """Writes JSON so that the old or the new file is there after a crash, never a mixture; OSError on a full disk."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with durable_file(partial) as descriptor:
            write_all(descriptor, json_bytes(obj))
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


class FolderWrite:
    """Context manager: fill `.path` with files; at the end the folder appears under its final name, whole and durable.

    On an exception the partial folder is removed and nothing has changed. With `replace=True` a folder already there
    is set aside as `<target>.aside-<n>` (`.aside`) just before the rename, for the caller to delete or keep;
    otherwise a target that exists is a UserError.
    """

    def __init__(self, target: Path, replace: bool = False) -> None:
        self.target = Path(target)
        self.path = self.target.with_name(f"{self.target.name}.partial-{os.getpid()}")
        self.aside: Path | None = None
        self._replace = replace

    def __enter__(self) -> FolderWrite:
        self._refuse_existing()
        make_folder(self.target.parent)
        if self.path.exists():  # of a killed process that had our id
            shutil.rmtree(self.path)
        self.path.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._publish()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)

    def _refuse_existing(self) -> None:
        if not self._replace and os.path.lexists(self.target):
            raise UserError(f"{self.target}: exists already; remove it or name another folder")

    def _publish(self) -> None:
        for folder, _, names in os.walk(self.path, topdown=False):
            for name in names:
                descriptor = os.open(Path(folder, name), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            fsync_folder(Path(folder))
        self._refuse_existing()
        if os.path.lexists(self.target):
            numbered = (self.target.with_name(f"{self.target.name}.aside-{n}") for n in itertools.count(1))
            self.aside = next(path for path in numbered if not os.path.lexists(path))
            os.rename(self.target, self.aside)
        try:
            os.rename(self.path, self.target)
        except OSError:
            if self.aside:
                os.rename(self.aside, self.target)
            raise
        fsync_folder(self.target.parent)
