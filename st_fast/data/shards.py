"""Reads records out of shards by index. Every read is checked against the record's CRC.

Reads are `pread`s, not memory maps: a shard that is cut off while it is used is then an error with a name instead of
a SIGBUS, memory stays flat over an epoch, and several threads may read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from st_fast.core.files import BadFile, Entry, inside, open_regular, read_exactly, read_header, sha256_file
from st_fast.core.machine import allow_open_files, usable_cpus
from st_fast.core.progress import bar
from st_fast.data.content import labels_problem, moments_problem
from st_fast.data.manifest import DTYPES, Manifest, ShardEntry, read_manifest
from st_fast.data.rows import CheckedRows

Say = Callable[[str], None]


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
        self.labels = self._column(layouts, "labels", np.dtype(np.int64))
        self._rows = CheckedRows(
            [self.folder / shard.file for shard in manifest.shards],
            [layout["moments"].start for layout in layouts],
            [shard.count for shard in manifest.shards],
            manifest.record_bytes,
            self._column(layouts, "crc32", np.dtype(np.uint32)),
            self.labels,
        )
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
        return self._rows.where(record)

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, 2C, H, W), C-contiguous, of the set's dtype.

        `BadFile` names shard and record when the bytes differ from what was written. Safe to call from many threads.
        """
        self._rows.read_into(indices, out)

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
        self._rows.close()

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
