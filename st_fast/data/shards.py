"""Reads records out of shards by index; every read is checked against the record's CRC. Opens any data layout.

Reads are `pread`s, not memory maps: a file that is cut off while it is used is then an error with a name instead of
a SIGBUS, memory stays flat over an epoch, and several threads may read at once.
"""

import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from st_fast.core.errors import Say, counted
from st_fast.core.files import BadFile, Entry, inside, open_regular, read_exactly, read_header, sha256_file
from st_fast.core.machine import allow_open_files, usable_cpus
from st_fast.core.progress import bar
from st_fast.data.ahead import RecordSet, nothing
from st_fast.data.buckets import BucketSet, check_batch, combined, has_buckets, read_buckets
from st_fast.data.layouts import READABLE, recognise
from st_fast.data.layouts.records import ForeignRecords
from st_fast.data.manifest import (
    DTYPES,
    FILE_NAME,
    Manifest,
    ShardedSet,
    ShardEntry,
    labels_problem,
    moments_problem,
    read_manifest,
)

COLUMNS = {"labels": ("I64", np.int64), "crc32": ("U32", np.uint32)}
"""The small tensors of a shard, one value a record: dtype in safetensors and in NumPy."""


class CheckedRows:
    """The rows of a manifest's shards, numbered through, each checked against its CRC-32 whenever it is read.

    `rows` names the tensor (count, *shape) of each shard. A row's CRC starts from its label, or its own number where
    shards have no labels, so that rows in another order are found out. `BadFile` for a file that isn't as listed.
    """

    labels: np.ndarray
    """(count,) int64: from the shards, or each record's own number."""

    def __init__(self, folder: Path, manifest: ShardedSet, rows: str, columns: tuple[str, ...]) -> None:
        self.folder, self._shards, self.size = Path(folder), manifest.shards, manifest.record_bytes
        allow_open_files(len(self._shards))
        self._starts = np.cumsum([0] + [shard.count for shard in self._shards])
        layouts = [self._layout(shard, manifest, rows, columns) for shard in self._shards]
        found = {name: self._column(layouts, name) for name in columns}
        self.labels, self._crcs = found.get("labels", np.arange(manifest.count)), found["crc32"]
        self._offsets = np.array([layout[rows].start for layout in layouts], np.int64)
        self._files = [os.open(self.folder / shard.file, os.O_RDONLY | os.O_CLOEXEC) for shard in self._shards]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, record: int) -> str:
        """A record's shard file and number in it, in words."""
        shard = int(np.searchsorted(self._starts, record, side="right")) - 1
        path = self.folder / self._shards[shard].file
        return f"{path}: record {record - self._starts[shard]} (number {record} of the set)"

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) into out (n, *shape), C-contiguous, of the set's dtype.

        `BadFile` names shard and record when the bytes differ from what was written. Safe to call from many threads.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            wrong = indices[(indices < 0) | (indices >= len(self))][0]
            raise IndexError(f"record {wrong}: {self.folder} has records 0 … {len(self) - 1}")
        rows = out.reshape(-1).view(np.uint8).data
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        files = [self._files[shard] for shard in shards.tolist()]
        positions = (self._offsets[shards] + (indices - self._starts[shards]) * self.size).tolist()
        if hasattr(os, "posix_fadvise"):  # not macOS; fetched all at once, a cold cache takes less than half as long
            for file, position in zip(files, positions, strict=True):
                os.posix_fadvise(file, position, self.size, os.POSIX_FADV_WILLNEED)
        for number, (record, file, position) in enumerate(zip(indices.tolist(), files, positions, strict=True)):
            row = rows[number * self.size : (number + 1) * self.size]
            found = os.preadv(file, [row], position)
            if found != self.size:
                raise BadFile(f"{self.where(record)}: {self.size} bytes expected, {found} read; the shard was cut off")
            if zlib.crc32(row, int(self.labels[record]) & 0xFFFFFFFF) != self._crcs[record]:
                raise BadFile(f"{self.where(record)}: its CRC-32 differs from the one written with it: bits flipped")

    def close(self) -> None:
        """Closes the files; the set can't be read any more."""
        for file in self._files:
            os.close(file)
        self._files = []

    def _layout(self, shard: ShardEntry, manifest: ShardedSet, rows: str, columns: tuple[str, ...]) -> dict[str, Entry]:
        """The position of each tensor in a shard, checked against the manifest."""
        path = inside(self.folder, shard.file)
        if not path.is_file():
            raise BadFile(f"{path}: the shard is missing; the manifest lists it with {shard.count} records")
        size = path.stat().st_size
        if size != shard.bytes:
            raise BadFile(f"{path}: {size} bytes, the manifest says {shard.bytes}: the shard was cut off or replaced")
        layout = read_header(path)
        shape = (shard.count, *manifest.shape)
        expected: dict[str, tuple[str, tuple[int, ...]]] = {rows: (DTYPES[manifest.dtype][0], shape)}
        expected |= {name: (COLUMNS[name][0], (shard.count,)) for name in columns}
        found = {name: (entry.dtype, entry.shape) for name, entry in layout.items()}
        if found != expected:
            raise BadFile(f"{path}: holds {found}; the manifest asks for {expected}")
        return layout

    def _column(self, layouts: list[dict[str, Entry]], name: str) -> np.ndarray:
        """One small tensor of all shards, concatenated."""
        column = np.empty(len(self), COLUMNS[name][1])
        for shard, layout, start in zip(self._shards, layouts, self._starts, strict=False):
            path = self.folder / shard.file
            with open_regular(path) as file:
                file.seek(layout[name].start)
                read_exactly(file, column[start : start + shard.count].view(np.uint8).data, path)
        return column


class ShardSet(CheckedRows, RecordSet):
    """The records of a folder of shards. Open with `open_data`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest, "moments", ("labels", "crc32"))
        self.manifest = manifest
        if problem := labels_problem(self.labels, manifest.num_classes):
            raise BadFile(f"{self.where(problem[0])}: {problem[1]}")

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        """Reads every shard whole, several at a time: SHA-256, the CRC of each record, and the values."""
        shards = range(len(self._shards))
        with ThreadPoolExecutor(min(4, usable_cpus()), "st_fast verify") as pool:
            for _ in bar(pool.map(partial(self._verify_shard, beat), shards), "verifying", len(shards), "shard"):
                pass

    def _verify_shard(self, beat: Callable[[], None], number: int) -> None:
        entry, first = self._shards[number], int(self._starts[number])
        right = sha256_file(self.folder / entry.file) == entry.sha256
        step = max(1, 2**24 // self.size)
        for start in range(first, first + entry.count, step):
            beat()
            moments, _ = self.gather(np.arange(start, min(start + step, first + entry.count)))
            if problem := moments_problem(moments.numpy(), self.manifest.posterior):
                raise BadFile(f"{self.where(start + problem[0])}: {problem[1]}")
        if not right:
            raise BadFile(
                f"{self.folder / entry.file}: SHA-256 differs from the manifest's though every record's CRC is right: "
                "the shard was rewritten or its header was edited"
            )


def open_data(
    folder: Path, verify: bool = True, at_least: int = 1, say: Say | None = None, beat: Callable[[], None] = nothing
) -> RecordSet:
    """The records of a folder of shards or of buckets, or of another project's latents, read in place.

    Manifest, sizes, headers and labels are checked; each mistake is one `BadFile` line. verify: also reads everything
    once, checking SHA-256, NaN, Inf and absurd values. Without it each record of a shard is still checked against its
    CRC whenever it is read. at_least: the records needed, one global batch, of each bucket. beat: called as verifying
    makes progress.
    """
    if has_buckets(folder):
        records: RecordSet = _open_buckets(folder, at_least)
    else:
        other = _in_place(Path(folder))
        records = ShardSet(folder, read_manifest(folder)) if other is None else other
    if len(records) < max(1, at_least):
        need = f"the global batch needs {at_least} (--optim.batch_size)" if len(records) else "nothing to train on"
        raise BadFile(f"data.path = {str(folder)!r}: {len(records)} records, {need}")
    if verify:
        records.verify(beat)
        if say:
            shards = len(records.manifest.shards)
            where = counted(shards, "shard") if shards else records.manifest.source.partition(",")[0]
            say(f"data: {len(records):,} records in {where} verified")
    return records


def _open_buckets(folder: Path, at_least: int) -> BucketSet:
    """The records of a folder of buckets."""
    manifests = read_buckets(folder)
    found = BucketSet(
        folder, combined(manifests), {name: ShardSet(folder / name, made) for name, made in manifests.items()}
    )
    check_batch(found, at_least)
    return found


def _in_place(folder: Path) -> ForeignRecords | None:
    """The records of another project's latents; `BadFile` where these must be converted first, or are no latents."""
    layout = recognise(folder)
    if layout is None:
        if folder.exists() and not (folder / FILE_NAME).exists():
            raise BadFile(
                f"data.path = {str(folder)!r}: no {FILE_NAME} in it; make the set with python -m st_fast.prepare. "
                f"Others' latents that can be read: {READABLE}"
            )
        return None
    records = layout.open(folder)
    try:
        records.refuse_in_place()
    except BadFile:
        records.close()
        raise
    return records


def read_any_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder of any layout; of ours, no latent is read."""
    if has_buckets(folder):
        return combined(read_buckets(folder))
    records = _in_place(Path(folder))
    if records is None:
        return read_manifest(folder)
    records.close()
    return records.manifest
