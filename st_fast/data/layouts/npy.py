"""Latents that lie as one .npy an image: each file is compared with what the first has."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, open_regular, read_exactly, shown
from st_fast.core.limits import npy_header
from st_fast.data.layouts.records import ForeignRecords
from st_fast.data.manifest import DTYPES

BLOCK = 1_024
"""Small files that a thread reads at once."""


class NpyRecords(ForeignRecords):
    """Records of which each is a file with the manifest's shape and dtype."""

    def read_stored(self, index: int, row: np.ndarray) -> None:
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
        read_exactly(file, row.reshape(-1).view(np.uint8).data, path)


def read_npy_header(path: Path) -> tuple[tuple[int, int, int], str, int, bool]:
    """(shape, dtype, first byte of the data, Fortran order) of a .npy file; `BadFile` for anything but float16/32 3-D.

    An array of Python objects is refused by its dtype and never unpickled.
    """
    with open_regular(path) as file:
        shape, dtype, start, fortran = found = npy_header(file, path)
        size = os.fstat(file.fileno()).st_size
    if dtype.name not in DTYPES or dtype.byteorder == ">" or len(shape) != 3 or shape[0] % 2:
        raise BadFile(f"{path}: {dtype} {shown(shape)}; float16 or float32 (2C, H, W) is needed")
    if size != start + found.size:
        raise BadFile(f"{path}: {size} bytes, {start + found.size} expected: it was cut off or has a tail")
    return (shape[0], shape[1], shape[2]), dtype.name, start, fortran


def read_small_files(
    folder: Path, names: Sequence[str], size: int, start: int, count: int, pool: ThreadPoolExecutor
) -> np.ndarray:
    """(n, count) uint8: of each of n files of `size` bytes the `count` from `start` on; `BadFile` names another size.

    A million files are opened, so this takes nothing but the system's calls.
    """
    rows = np.empty((len(names), count), np.uint8)

    def read(first: int) -> None:
        for number in range(first, min(first + BLOCK, len(names))):
            path = folder / names[number]
            with open_regular(path) as file:
                found = os.fstat(file.fileno()).st_size
                data = os.pread(file.fileno(), count, start)
            if found != size or len(data) != count:
                raise BadFile(f"{path}: {found} bytes, {size} expected, as {names[0]} has")
            rows[number] = np.frombuffer(data, np.uint8)

    for _ in pool.map(read, range(0, len(names), BLOCK)):
        pass
    return rows
