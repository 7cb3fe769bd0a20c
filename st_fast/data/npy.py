"""Latents that lie as one .npy an image: read by number on threads, each file compared with what the first has."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, open_regular, read_exactly, shown
from st_fast.core.limits import npy_header
from st_fast.data.ahead import FilesIdentity, RecordSet, nothing
from st_fast.data.manifest import DTYPES, moments_problem


class NpyRecords(RecordSet):
    """Records of which each is a file. A layout sets `names`, `labels` and `manifest`, then calls `open_files`."""

    root: Path
    """Where the files lie."""
    names: Sequence[str]
    """Of the records' files, in their order."""

    def open_files(self, root: Path, threads: int) -> None:
        """Starts the threads."""
        self.root, self._pool = root, ThreadPoolExecutor(threads, "st_fast npy")
        self._files: FilesIdentity | None = None

    @property
    def files(self) -> FilesIdentity:
        """Sizes and times of the files, taken when first asked for; `BadFile` names one that can't be found."""
        if self._files is None:
            self._files = FilesIdentity(self._stat(self.watched()))
        return self._files

    def watched(self) -> Sequence[str]:
        """The files whose change is noticed: those of the records, and what a layout has beside them."""
        return self.names

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, 2C, H, W) of the set's dtype. `BadFile` names a bad file."""
        for _ in self._pool.map(self._read_one, np.asarray(indices).tolist(), out):
            pass

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """Reads every file: shape, dtype, NaN, Inf and absurd values; `files` then has the content's hash."""
        content = hashlib.sha256()
        for start in range(0, len(self), 1024):
            beat()
            moments = self.gather(np.arange(start, min(start + 1024, len(self))))[0].numpy()
            if problem := moments_problem(moments, self.manifest.posterior):
                raise BadFile(f"{self.root / self.names[start + problem[0]]}: {problem[1]}")
            content.update(moments.tobytes())
        self._files = FilesIdentity(self.files.stat, content.hexdigest())

    def _stat(self, names: Sequence[str]) -> str:
        """SHA-256 of the files' names, sizes and times."""
        found = hashlib.sha256()

        def look(name: str) -> tuple[int, int]:
            try:
                status = (self.root / name).stat()
            except OSError as error:
                raise BadFile(f"{self.root / name}: {error.strerror}") from None
            return status.st_size, status.st_mtime_ns

        for name, status in zip(names, self._pool.map(look, names), strict=True):
            found.update(f"{name!r} {status}\n".encode())
        return found.hexdigest()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read_one(self, index: int, row: np.ndarray) -> None:
        """Reads one record into row (2C, H, W)."""
        read_npy_into(self.root / self.names[index], self.manifest.shape, self.manifest.dtype, row)


def read_npy_into(path: Path, shape: tuple[int, ...], dtype: str, row: np.ndarray) -> None:
    """Reads an array of that shape and dtype into `row`, which has as many elements; `BadFile` for any other file."""
    with open_regular(path) as file:
        found = npy_header(file, path)
        if (found.shape, found.dtype) != (shape, np.dtype(dtype)) or found.fortran:
            raise BadFile(
                f"{path}: {found.dtype} {shown(found.shape)}{' in Fortran order' if found.fortran else ''}; the first "
                f"file of the set has {dtype} {shape}"
            )
        size = os.fstat(file.fileno()).st_size
        if size != found.start + row.nbytes:
            raise BadFile(f"{path}: {size} bytes, {found.start + row.nbytes} expected: it was cut off or has a tail")
        file.seek(found.start)
        read_exactly(file, row.reshape(-1).view(np.uint8).data, path)


def read_npy_header(path: Path) -> tuple[tuple[int, int, int], str, int, bool]:
    """(shape, dtype, first byte of the data, Fortran order) of a .npy file; `BadFile` for anything but float16/32 3-D.

    An array of Python objects is refused by its dtype and never unpickled.
    """
    with open_regular(path) as file:
        shape, dtype, start, fortran = npy_header(file, path)
    if dtype.name not in DTYPES or dtype.byteorder == ">" or len(shape) != 3 or shape[0] % 2:
        raise BadFile(f"{path}: {dtype} {shown(shape)}; float16 or float32 (2C, H, W) is needed")
    return (shape[0], shape[1], shape[2]), dtype.name, start, fortran
