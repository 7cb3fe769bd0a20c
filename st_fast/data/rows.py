"""Rows of one size, numbered through over several files, read by index. Every row is checked against its CRC.

Reads are `pread`s, not memory maps: a file that is cut off while it is used is then an error with a name instead of
a SIGBUS, memory stays flat over an epoch, and several threads may read at once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile

HAS_ADVICE = hasattr(os, "posix_fadvise")
"""Whether the system can be told what will be read; macOS can't."""


class CheckedRows:
    """`counts[k]` rows of `size` bytes from byte `offsets[k]` of file `paths[k]` on.

    crcs (n,) uint32 are the CRC-32s of the rows, each started from its number in `crc_starts` (n,) int64.
    """

    def __init__(
        self, paths: Sequence[Path], offsets: Sequence[int], counts: Sequence[int], size: int,
        crcs: np.ndarray, crc_starts: np.ndarray,
    ) -> None:  # fmt: skip
        self.paths, self.size = list(paths), size
        self._offsets = np.array(offsets, np.int64)
        self._starts = np.cumsum([0, *counts])
        self._crcs, self._crc_starts = crcs, crc_starts
        self._files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, record: int) -> str:
        """A row's place in words: file and number in it."""
        shard = int(np.searchsorted(self._starts, record, side="right")) - 1
        return f"{self.paths[shard]}: record {record - self._starts[shard]} (number {record} of the set)"

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads rows `indices` (n,) into out, n rows of `size` bytes, C-contiguous. Safe to call from many threads.

        `BadFile` names file and row when the bytes differ from what was written.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            wrong = indices[(indices < 0) | (indices >= len(self))][0]
            raise IndexError(f"record {wrong}: {self.paths[0].parent} has records 0 … {len(self) - 1}")
        rows = out.reshape(-1).view(np.uint8).data
        places = self._places(indices)
        if HAS_ADVICE:  # the disk may fetch all of them at once: more than twice as fast out of a cold cache
            for file, position in places:
                os.posix_fadvise(file, position, self.size, os.POSIX_FADV_WILLNEED)
        for number, (record, (file, position)) in enumerate(zip(indices.tolist(), places, strict=True)):
            row = rows[number * self.size : (number + 1) * self.size]
            found = os.preadv(file, [row], position)
            if found != self.size:
                raise BadFile(f"{self.where(record)}: {self.size} bytes expected, {found} read; the shard was cut off")
            if zlib.crc32(row, int(self._crc_starts[record]) & 0xFFFFFFFF) != self._crcs[record]:
                raise BadFile(f"{self.where(record)}: its CRC-32 differs from the one written with it: bits flipped")

    def close(self) -> None:
        """Closes the files; nothing can be read any more."""
        for file in self._files:
            os.close(file)
        self._files = []

    def _places(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Each row's open file and first byte."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        positions = self._offsets[shards] + (indices - self._starts[shards]) * self.size
        return [(self._files[shard], start) for shard, start in zip(shards.tolist(), positions.tolist(), strict=True)]
