"""Reads records out of shards by index. Every read is checked against the record's CRC.

Reads are `pread`s, not memory maps: a shard that is cut off while it is used is then an error with a name instead of
a SIGBUS, memory stays flat over an epoch, and several threads may read at once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from st_fast.data.content import labels_problem, moments_problem
from st_fast.data.machine import allow_open_files, usable_cpus
from st_fast.data.manifest import DTYPES, Manifest, ShardEntry, check_same_data, read_manifest
from st_fast.data.progress import bar
from st_fast.data.writing import SHARD_SIZE, write_shards
from st_fast.safefile import BadFile, Entry, inside, open_regular, read_exactly, read_header, sha256_file

__all__ = [
    "SHARD_SIZE",
    "Manifest",
    "RecordSet",
    "ShardSet",
    "check_same_data",
    "open_shards",
    "read_manifest",
    "write_shards",
]

Say = Callable[[str], None]
HAS_ADVICE = hasattr(os, "posix_fadvise")
"""Whether the system can be told what will be read; macOS can't."""


class RecordSet(Protocol):
    """Records that can be read by index: shards, or REPA's layout in place."""

    @property
    def manifest(self) -> Manifest:
        """What the set holds."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """(count,) int64."""
        ...

    @property
    def digest(self) -> str:
        """The manifest's digest: a resumed run compares it."""
        ...

    def __len__(self) -> int:
        """How many records."""
        ...

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, 2C, H, W) of the set's dtype; `BadFile` names a bad record."""
        ...

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Records `indices` (n,) → moments (n, 2C, H, W) in the set's dtype, labels (n,) int64, on the host."""
        ...

    def verify(self) -> None:
        """Reads everything once; `BadFile` names the first record that is not what it should be."""
        ...

    def close(self) -> None:
        """Closes files and threads; the set can't be read any more."""
        ...


class ShardSet:
    """The records of a folder of shards, numbered through. Open with `open_shards`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self._starts = np.cumsum([0] + [shard.count for shard in manifest.shards])
        allow_open_files(len(manifest.shards))
        layouts = [_layout(self.folder, shard, manifest) for shard in manifest.shards]
        self._offsets = np.array([layout["moments"].start for layout in layouts], np.int64)
        self.labels = self._column(layouts, "labels", np.dtype(np.int64))
        self._crcs = self._column(layouts, "crc32", np.dtype(np.uint32))
        self._files = [os.open(self.folder / shard.file, os.O_RDONLY | os.O_CLOEXEC) for shard in manifest.shards]
        problem = labels_problem(self.labels, manifest.num_classes)
        if problem:
            raise BadFile(f"{self.where(problem[0])}: {problem[1]}")

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def digest(self) -> str:
        """The manifest's digest: a resumed run compares it."""
        return self.manifest.digest

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of the moments."""
        return np.dtype(self.manifest.dtype)

    def where(self, record: int) -> str:
        """A record's place in words: shard file and number in it."""
        shard = int(np.searchsorted(self._starts, record, side="right")) - 1
        name = self.folder / self.manifest.shards[shard].file
        return f"{name}: record {record - self._starts[shard]} (number {record} of the set)"

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, 2C, H, W), C-contiguous, of the set's dtype.

        `BadFile` names shard and record when the bytes differ from what was written. Safe to call from many threads.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            wrong = indices[(indices < 0) | (indices >= len(self))][0]
            raise IndexError(f"record {wrong}: {self.folder} has records 0 … {len(self) - 1}")
        size = self.manifest.record_bytes
        rows = out.reshape(-1).view(np.uint8).data
        places = self._places(indices)
        if HAS_ADVICE:  # the disk may fetch all of them at once: more than twice as fast out of a cold cache
            for file, position in places:
                os.posix_fadvise(file, position, size, os.POSIX_FADV_WILLNEED)
        for number, (record, (file, position)) in enumerate(zip(indices.tolist(), places, strict=True)):
            row = rows[number * size : (number + 1) * size]
            found = os.preadv(file, [row], position)
            if found != size:
                raise BadFile(f"{self.where(record)}: {size} bytes expected, {found} read; the shard was cut off")
            if zlib.crc32(row, int(self.labels[record]) & 0xFFFFFFFF) != self._crcs[record]:
                raise BadFile(f"{self.where(record)}: its CRC-32 differs from the one written with it: bits flipped")

    def _places(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Each record's open file and first byte."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        positions = self._offsets[shards] + (indices - self._starts[shards]) * self.manifest.record_bytes
        return [(self._files[shard], start) for shard, start in zip(shards.tolist(), positions.tolist(), strict=True)]

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Records `indices` (n,) → moments (n, 2C, H, W) in the set's dtype, labels (n,) int64; fresh host tensors."""
        moments = np.empty((len(indices), *self.manifest.shape), self.dtype)
        self.read_into(indices, moments)
        return torch.from_numpy(moments), torch.from_numpy(self.labels[indices])

    def verify(self) -> None:
        """Reads every shard whole, several at a time: SHA-256, the CRC of each record, and the values."""
        shards = range(len(self.manifest.shards))
        with ThreadPoolExecutor(min(4, usable_cpus()), "st_fast verify") as pool:
            work = pool.map(self._verify_shard, shards)
            for _ in bar(work, "verifying", len(shards), "shards"):
                pass

    def _verify_shard(self, number: int) -> None:
        entry, first = self.manifest.shards[number], int(self._starts[number])
        right = sha256_file(self.folder / entry.file) == entry.sha256
        step = max(1, 2**24 // self.manifest.record_bytes)
        for start in range(first, first + entry.count, step):
            records = np.arange(start, min(start + step, first + entry.count))
            moments = np.empty((len(records), *self.manifest.shape), self.dtype)
            self.read_into(records, moments)
            problem = moments_problem(moments)
            if problem:
                raise BadFile(f"{self.where(start + problem[0])}: {problem[1]}")
        if not right:
            raise BadFile(
                f"{self.folder / entry.file}: SHA-256 differs from the manifest's though every record's CRC is right: "
                "the shard was rewritten or its header was edited"
            )

    def close(self) -> None:
        """Closes the files; the set can't be read any more."""
        for file in self._files:
            os.close(file)
        self._files = []

    def _column(self, layouts: list[dict[str, Entry]], name: str, dtype: np.dtype) -> np.ndarray:
        """One small tensor of all shards, concatenated."""
        column = np.empty(len(self), dtype)
        for shard, layout, start in zip(self.manifest.shards, layouts, self._starts, strict=False):
            path = self.folder / shard.file
            with open_regular(path) as file:
                file.seek(layout[name].start)
                read_exactly(file, column[start : start + shard.count].view(np.uint8).data, path)
        return column


def open_shards(folder: Path, verify: bool = True, at_least: int = 1, say: Say | None = None) -> ShardSet:
    """Opens a folder of shards after checking manifest, sizes, headers and labels; each mistake is one `BadFile` line.

    verify: also reads everything once, checking SHA-256, NaN, Inf and absurd values. Without it each record is still
    checked against its CRC whenever it is read. at_least: the records needed, one global batch.
    """
    manifest = read_manifest(folder)
    check_size(folder, manifest, at_least)
    shards = ShardSet(folder, manifest)
    if verify:
        shards.verify()
        if say:
            say(f"data: {manifest.count:,} records in {len(manifest.shards)} shards verified")
    return shards


def check_size(folder: Path, manifest: Manifest, at_least: int) -> None:
    """`BadFile` for an empty set or one smaller than a batch."""
    if manifest.count < max(1, at_least):
        need = f"the global batch needs {at_least}" if manifest.count else "nothing to train on"
        raise BadFile(f"data.path = {str(folder)!r}: {manifest.count} records, {need}")


def _layout(folder: Path, shard: ShardEntry, manifest: Manifest) -> dict[str, Entry]:
    """Where a shard's tensors lie, checked against the manifest."""
    path = inside(folder, shard.file)
    if not path.is_file():
        raise BadFile(f"{path}: the shard is missing; the manifest lists it with {shard.count} records")
    size = path.stat().st_size
    if size != shard.bytes:
        raise BadFile(f"{path}: {size} bytes, the manifest says {shard.bytes}: the shard was cut off or replaced")
    layout = read_header(path)
    expected = {
        "moments": (DTYPES[manifest.dtype][0], (shard.count, *manifest.shape)),
        "labels": ("I64", (shard.count,)),
        "crc32": ("U32", (shard.count,)),
    }
    found = {name: (entry.dtype, entry.shape) for name, entry in layout.items()}
    if found != expected:
        raise BadFile(f"{path}: holds {found}; the manifest asks for {expected}")
    return layout
