"""Latents of several shapes: a folder of shards for each, a bucket, and buckets.json, which lists them in order.

A bucket is a whole set, which can be opened alone. Records are numbered through, bucket after bucket; what is read at
once is of one bucket.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, inside, read_json, shown, write_json_atomic
from st_fast.core.random import RecordOrder, bucket_order
from st_fast.core.records import record_from
from st_fast.data.ahead import RecordSet, nothing
from st_fast.data.manifest import INDEX_NAME, Manifest, read_manifest

FORMAT = "st_fast.buckets"
MOST_BUCKETS = 64
FOLDER = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}")
"""A bucket's folder: height and width in pixels."""
SHARED = (
    "channels", "dtype", "normalisation", "posterior", "vae", "num_classes", "class_names", "flip",
)  # fmt: skip
"""What the manifests of all buckets must have in common."""


@dataclass(frozen=True)
class Bucket:
    """One shape: its folder, the number of its records, and the digest of its manifest."""

    folder: str
    count: int
    digest: str


@dataclass(frozen=True)
class BucketIndex:
    """The content of buckets.json."""

    buckets: tuple[Bucket, ...]
    format: str = FORMAT
    version: int = 1

    def __post_init__(self) -> None:
        names = [bucket.folder for bucket in self.buckets]
        if not 1 <= len(names) <= MOST_BUCKETS or len(set(names)) < len(names):
            raise BadFile(f"buckets: {len(names)}: 1 to {MOST_BUCKETS} are possible, none listed twice")
        if wrong := [name for name in names if not FOLDER.fullmatch(name)]:
            raise BadFile(f"buckets: folder = {shown(wrong[0])}: height and width such as 224x288 are needed")


def has_buckets(folder: Path) -> bool:
    """Whether a folder holds latents of several shapes."""
    return (Path(folder) / INDEX_NAME).is_file()


def write_index(folder: Path, names: Sequence[str]) -> None:
    """Writes buckets.json over the finished sets in these folders."""
    manifests = [read_manifest(folder / name) for name in names]
    buckets = (Bucket(name, made.count, made.digest) for name, made in zip(names, manifests, strict=True))
    write_json_atomic(folder / INDEX_NAME, asdict(BucketIndex(tuple(buckets))))


def read_buckets(folder: Path) -> dict[str, Manifest]:
    """The manifests of a folder's buckets, by their folders, in order; no latent is read.

    `BadFile` for an index or a manifest that is none, that differs from what the index says, or does not go with the
    others.
    """
    path = Path(folder) / INDEX_NAME
    raw = read_json(path)
    if raw.get("format") != FORMAT or raw.get("version") != 1:
        found = f"format = {shown(raw.get('format'))}, version = {shown(raw.get('version'))}"
        raise BadFile(f"{path}: {found}: {FORMAT!r} of version 1 is needed")
    manifests: dict[str, Manifest] = {}
    for bucket in record_from(BucketIndex, raw, str(path)).buckets:
        made = manifests[bucket.folder] = read_manifest(inside(folder, bucket.folder))
        if (made.count, made.digest) != (bucket.count, bucket.digest):
            raise BadFile(f"{path}: {bucket.folder} is not the set that was listed: its manifest was changed")
    first, *others = manifests.items()
    for name, made in others:
        for key in SHARED:
            ours, theirs = getattr(first[1], key), getattr(made, key)
            if ours != theirs:
                raise BadFile(f"{path}: {name} has {key} = {shown(theirs)}, {first[0]} has {shown(ours)}")
    return manifests


def combined(manifests: dict[str, Manifest]) -> Manifest:
    """One manifest over all buckets: of the first's shape, with the records and shards of all."""
    shards = tuple(
        replace(shard, file=f"{name}/{shard.file}") for name, made in manifests.items() for shard in made.shards
    )
    first = next(iter(manifests.values()))
    return replace(first, count=sum(made.count for made in manifests.values()), shards=shards)


class BucketSet(RecordSet):
    """The records of all buckets. Open with `open_data`."""

    def __init__(self, folder: Path, manifest: Manifest, sets: dict[str, RecordSet]) -> None:
        self.folder, self.manifest, self.sets = Path(folder), manifest, sets
        self.parts = tuple(sets.values())
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.labels = np.concatenate([part.labels for part in self.parts])

    @property
    def counts(self) -> list[int]:
        """Records of each bucket."""
        return [len(part) for part in self.parts]

    def bucket_of(self, indices: np.ndarray) -> int:
        """The bucket that all of these records are of; ValueError where they are of several, or there are none."""
        found = np.unique(np.searchsorted(self.starts, indices, side="right") - 1)
        if len(found) != 1:
            raise ValueError(f"{self.folder}: records of {len(found)} shapes at once")
        return int(found[0])

    def shape_of(self, indices: np.ndarray) -> tuple[int, ...]:
        return self.parts[self.bucket_of(indices)].manifest.shape

    def by_shape(self, indices: np.ndarray) -> list[np.ndarray]:
        buckets = np.searchsorted(self.starts, indices, side="right")
        return [indices[buckets == bucket] for bucket in np.unique(buckets)]

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads records `indices` (n,) of one bucket into out (n, *its shape)."""
        bucket = self.bucket_of(indices)
        self.parts[bucket].read_into(np.asarray(indices) - self.starts[bucket], out)

    def verify(self, beat: Callable[[], None] = nothing) -> None:
        for part in self.parts:
            part.verify(beat)

    def close(self) -> None:
        for part in self.parts:
            part.close()


class BucketOrder:
    """Maps ordinals of the training stream to record indices where every batch is of one bucket of the records.

    Each epoch has ⌊records / batch⌋ batches of every bucket, in a drawn order. The records of a bucket come in the
    order in which they would come alone (`RecordOrder`), on and on, so that those which an epoch leaves over are the
    next one's first. A batch follows from its number: none before it is drawn. Records are numbered through, bucket
    after bucket.
    """

    def __init__(self, seed: int, sizes: Sequence[int], batch_size: int) -> None:
        """ValueError where a bucket has fewer records than a batch."""
        if min(sizes) < batch_size:
            raise ValueError(f"a bucket of {min(sizes)} records, a batch of {batch_size}")
        self.seed, self.batch_size = seed, batch_size
        self._orders = [RecordOrder(seed, size) for size in sizes]
        self._starts = np.cumsum([0, *sizes])
        self._batches = np.array([size // batch_size for size in sizes])
        self._of_epoch = lru_cache(self._drawn)

    def bucket_at(self, step: int) -> tuple[int, int]:
        """The bucket of a step's batch, and how many batches of that bucket come before it."""
        epoch, place = divmod(step, int(self._batches.sum()))
        buckets, before = self._of_epoch(epoch)
        return int(buckets[place]), int(before[place])

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each batch of an epoch its bucket, and how many of that bucket come before it, of all epochs."""
        order = bucket_order(self.seed, epoch, int(self._batches.sum()))
        buckets = np.repeat(np.arange(len(self._batches)), self._batches)[order]
        before = np.empty_like(buckets)
        for bucket, count in enumerate(self._batches):
            before[buckets == bucket] = np.arange(count) + epoch * count
        return buckets, before

    def __call__(self, ordinals: np.ndarray) -> np.ndarray:
        """(B,) int64 ordinals → (B,) int64 record indices."""
        steps, places = np.divmod(ordinals, self.batch_size)
        records = np.empty_like(ordinals)
        for step in np.unique(steps):
            bucket, before = self.bucket_at(int(step))
            chosen = steps == step
            own = self._orders[bucket](before * self.batch_size + places[chosen])
            records[chosen] = own + self._starts[bucket]
        return records


def parts_of(records: RecordSet) -> dict[str, RecordSet]:
    """The sets of one shape that records consist of, by name; of a set of one shape that itself, without a name."""
    return records.sets if isinstance(records, BucketSet) else {"": records}


def one_shape(records: RecordSet, what: str) -> RecordSet:
    """The records; UserError where they are of several shapes, which `what` does not take."""
    if isinstance(records, BucketSet):
        names = ", ".join(str(records.folder / name) for name in list(records.sets)[:8])
        raise UserError(f"{records.folder}: latents of several shapes; {what} takes one: name one of {names}")
    return records


def check_batch(records: BucketSet, batch: int) -> None:
    """UserError naming the buckets that have fewer records than a global batch."""
    small = {name: len(part) for name, part in records.sets.items() if len(part) < batch}
    if small:
        named = ", ".join(f"{name} has {count}" for name, count in small.items())
        raise UserError(
            f"data.path = {str(records.folder)!r}: a batch is of one shape, the global batch needs {batch} records "
            f"(--optim.batch_size), and {named}: take a smaller batch, or prepare with fewer --buckets"
        )
