"""Writes the features of a set's images beside its latents: in the records' order, a shard at a time, continued if cut.

Shard k is made by process k mod world alone; whoever finds all of them there writes the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_fast.data.features import FeatureManifest, features_folder
from st_fast.data.images import BadImage, load_image
from st_fast.data.job import Worker
from st_fast.data.machine import usable_cpus
from st_fast.data.manifest import FILE_NAME, ShardEntry
from st_fast.data.shards import RecordSet
from st_fast.data.source import Source
from st_fast.data.writing import record_crcs, write_tensors
from st_fast.encoders import ImageEncoder
from st_fast.errors import UserError
from st_fast.safefile import make_folder, read_json, write_json_atomic

SHARD_BYTES = 2**28
JOB_FILE = "job.json"
ALONE = Worker()
Images = Callable[[np.ndarray], Tensor]
"""Record numbers (n,) → uint8 images (n, 1 or 3, S, S)."""


class SourceImages:
    """The images of a set's records, out of the source that the set was made from.

    UserError where the source can't be that: another number of usable images, or other labels.
    """

    def __init__(self, source: Source, records: RecordSet, size: int) -> None:
        self.source, self.size, self.views = source, size, 2 if records.manifest.flip else 1
        self._check_crop(records)
        self.numbers = np.arange(len(source.names))
        if self.views * len(self.numbers) != len(records):  # some were left out when the latents were made
            self.numbers = np.array([number for number in self.numbers if self._usable(int(number))], np.int64)
        count = self.views * len(self.numbers)
        if count != len(records):
            raise UserError(f"{source.description}: {count} images with their mirrored ones, {len(records)} latents")
        labels = np.repeat(source.labels[self.numbers], self.views)
        wrong = np.flatnonzero(labels != records.labels)
        if len(wrong):
            at = wrong[0]
            raise UserError(
                f"{source.description}: not what the latents were made from: record {at} has label "
                f"{records.labels[at]}, its image {labels[at]}"
            )

    def __call__(self, records: np.ndarray) -> Tensor:
        """uint8 (n, 3, size, size); of a set with flips, every odd record is its image mirrored."""
        with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
            images = list(pool.map(self._load, records.tolist()))
        return torch.stack(images)

    def _load(self, record: int) -> Tensor:
        number = int(self.numbers[record // self.views])
        try:
            image = torch.from_numpy(load_image(self.source.read(number), self.size, 3))
        except (BadImage, OSError) as error:
            raise UserError(f"{self.source.names[number]!a}: can't be used, but has a latent ({error})") from None
        return image.flip(-1) if record % self.views else image

    def _usable(self, number: int) -> bool:
        try:
            load_image(self.source.read(number), self.size, 3)
        except (BadImage, OSError):
            return False
        return True

    def _check_crop(self, records: RecordSet) -> None:
        made = records.manifest.source
        if "centre crop " in made and not made.endswith(f"centre crop {self.size}"):
            raise UserError(f"--size {self.size}: the latents are of {made!r}; give the same size")


def template(encoder: ImageEncoder, records: RecordSet, size: int) -> FeatureManifest:
    """The manifest but for its shards."""
    count = len(records)
    return FeatureManifest(
        encoder.name, encoder.hash, (*encoder.grid(size), encoder.width), size, records.digest, count,
        count * encoder.flops(size),
    )  # fmt: skip


def write_features(
    data: Path, records: RecordSet, encoder: ImageEncoder, images: Images, size: int, batch: int = 32,
    worker: Worker = ALONE, progress: Callable[[int], object] = lambda records: None,
) -> FeatureManifest | None:  # fmt: skip
    """Writes this worker's missing shards; returns the manifest once all of all workers are there, else None.

    UserError where the folder was begun with another encoder or for other latents.
    """
    planned = template(encoder, records, size)
    folder = features_folder(data, encoder.name)
    _check_job(folder, planned)
    rows = max(1, SHARD_BYTES // planned.record_bytes)
    parts = [np.arange(start, min(start + rows, len(records))) for start in range(0, len(records), rows)]
    for number in range(worker.rank, len(parts), worker.world):
        if not _note(folder, number).is_file():
            features = np.empty((len(parts[number]), *planned.shape), planned.dtype)
            for start in range(0, len(features), batch):
                stop = min(start + batch, len(features))
                features[start:stop] = _features(encoder, images(parts[number][start:stop]))
                progress(stop - start)
            crcs = record_crcs(features, parts[number])
            entry = write_tensors(folder / f"features-{number:05d}.safetensors", {"features": features, "crc32": crcs})
            write_json_atomic(_note(folder, number), asdict(entry))
        else:
            progress(len(parts[number]))
    if not all(_note(folder, number).is_file() for number in range(len(parts))):
        return None
    shards = tuple(ShardEntry(**read_json(_note(folder, number))) for number in range(len(parts)))
    manifest = replace(planned, shards=shards)
    write_json_atomic(folder / FILE_NAME, asdict(manifest))
    return manifest


def _features(encoder: ImageEncoder, images: Tensor) -> np.ndarray:
    features = encoder(images).cpu().half()
    if not features.isfinite().all():
        raise UserError(f"encoder {encoder.name}: features that float16 can't hold (NaN, Inf or above 65504)")
    return features.numpy()


def _note(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.json"


def _check_job(folder: Path, planned: FeatureManifest) -> None:
    wanted = {**asdict(planned), "shape": list(planned.shape), "shards": []}
    make_folder(folder)
    if not (folder / JOB_FILE).is_file():
        write_json_atomic(folder / JOB_FILE, wanted)
    begun = read_json(folder / JOB_FILE)
    differing = [key for key in wanted if begun.get(key) != wanted[key]]
    if differing:
        changes = ", ".join(f"{key} was {begun.get(key)!r} and is {wanted[key]!r}" for key in differing)
        raise UserError(f"{folder}: begun with other settings ({changes}); remove the folder to write them anew")
