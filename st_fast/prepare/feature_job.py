"""Writes the features of a set's images beside its latents: in the records' order, a shard at a time, continued if cut.

Shard k is made by process k mod world alone; whoever finds all of them there writes the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, read_json, write_json_atomic
from st_fast.data.features import FeatureManifest, features_folder
from st_fast.data.manifest import FILE_NAME, ShardEntry
from st_fast.data.shards import RecordSet
from st_fast.model.encoders import ImageEncoder
from st_fast.prepare.job import Worker
from st_fast.prepare.writing import record_crcs, write_tensors

SHARD_BYTES = 2**28
JOB_FILE = "job.json"
ALONE = Worker()
Images = Callable[[np.ndarray], Tensor]
"""Record numbers (n,) → uint8 images (n, 1 or 3, S, S)."""


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
