"""Features of image encoders beside the latents: one row a record, in the records' order, in shards of their own.

They lie in DATA/features/<encoder's last name>/ with a manifest.json that names the encoder, the hash of its weights,
the grid, and the digest of the latents they belong to. The latents' own manifest stays as it is, and with it every run
that was started on them. Every row is checked against its CRC whenever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import (
    BadFile,
    Entry,
    inside,
    open_regular,
    read_exactly,
    read_header,
    read_json,
    sha256_file,
    shown,
)  # fmt: skip
from st_fast.data.manifest import DTYPES, FILE_NAME, ShardedSet, ShardEntry
from st_fast.data.rows import CheckedRows
from st_fast.data.shards import RecordSet
from st_fast.recipe.schema import Recipe, Stage

FORMAT = "st_fast.features"
VERSION = 1
FOLDER = "features"


@dataclass(frozen=True)
class FeatureManifest(ShardedSet):
    """What a folder of features holds."""

    encoder: str
    hash: str
    """SHA-256 of the encoder's weights."""
    shape: tuple[int, int, int]
    """(h, w, D) of one record's features: the grid, and the encoder's width."""
    size: int
    """Pixels a side of the images, before the encoder's preprocessing."""
    latents: str
    """Digest of the latents' manifest."""
    count: int
    flops: float
    """What computing all of them took."""
    dtype: str = "float16"
    shards: tuple[ShardEntry, ...] = ()
    format: str = FORMAT
    version: int = VERSION


def features_folder(data: Path, encoder: str) -> Path:
    """Where an encoder's features lie: named by the last part of a hub name, or by a folder's name."""
    return Path(data) / FOLDER / Path(encoder).name


class FeatureSet:
    """Features that can be read by record index; what `ReadAhead` needs to do so. Open with `open_features`."""

    def __init__(self, folder: Path, manifest: FeatureManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.labels = np.arange(manifest.count)
        """Each record's own number: its CRC starts from it, so that rows in another order are found out."""
        layouts = [_layout(folder, shard, manifest) for shard in manifest.shards]
        paths = [folder / shard.file for shard in manifest.shards]
        crcs = np.empty(manifest.count, np.uint32)
        start = 0
        for path, layout, shard in zip(paths, layouts, manifest.shards, strict=True):
            with open_regular(path) as file:
                file.seek(layout["crc32"].start)
                read_exactly(file, crcs[start : start + shard.count].view(np.uint8).data, path)
            start += shard.count
        offsets, counts = [layout["features"].start for layout in layouts], [s.count for s in manifest.shards]
        self._rows = CheckedRows(paths, offsets, counts, manifest.record_bytes, crcs, self.labels)

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads features of records `indices` (n,) into out (n, h, w, D); `BadFile` names a bad row."""
        self._rows.read_into(indices, out)

    def verify(self) -> None:
        """Compares every shard with its SHA-256; `BadFile` names the first that differs."""
        for shard in self.manifest.shards:
            if sha256_file(self.folder / shard.file) != shard.sha256:
                raise BadFile(f"{self.folder / shard.file}: its SHA-256 isn't the manifest's: it was changed")

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()


def open_features(data: Path, encoder: str, records: RecordSet) -> FeatureSet:
    """An encoder's features of these records. UserError if there are none, `BadFile` if they are of something else."""
    folder = features_folder(data, encoder)
    if not (folder / FILE_NAME).is_file():
        raise UserError(
            f"{folder}: no complete features of {encoder}; write them with "
            f"python -m st_fast.prepare --features {encoder} IMAGES {data}"
        )
    manifest = read_features(folder)
    if encoder not in (manifest.encoder, Path(manifest.encoder).name) and Path(encoder).name != manifest.encoder:
        raise UserError(f"{folder}: features of {shown(manifest.encoder)}; the recipe names {encoder!r}")
    if (manifest.latents, manifest.count) != (records.digest, len(records)):
        raise BadFile(
            f"{folder}: features of {manifest.count} other records than the {len(records)} in {data}; "
            "remove the folder and write them again"
        )
    return FeatureSet(folder, manifest)


def check_grid(encoder: str, grid: tuple[int, int], side: int, interpolate: bool, stage: str) -> None:
    """UserError, naming both, where the features' grid is not the model's side × side tokens."""
    if grid != (side, side) and not interpolate:
        raise UserError(
            f"stage.{stage}: {encoder} has a grid of {grid[0]} x {grid[1]} patches, the model one of "
            f"{side} x {side} tokens; interpolate = true in this stage resizes the features"
        )


def read_features(folder: Path) -> FeatureManifest:
    """Reads and checks folder/manifest.json; `BadFile` in one line."""
    path = folder / FILE_NAME
    raw = read_json(path)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise BadFile(
            f"{path}: format {shown(raw.get('format'))} {shown(raw.get('version'))}: {FORMAT} {VERSION} needed"
        )
    try:
        manifest = _from_json(raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise BadFile(f"{path}: a field is missing, unknown or of the wrong type ({error})") from None
    shape = manifest.shape
    if manifest.dtype not in DTYPES or len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape):
        raise BadFile(
            f"{path}: shape {shown(shape)} of {shown(manifest.dtype)}: (h, w, D) of {', '.join(DTYPES)} needed"
        )
    if sum(shard.count for shard in manifest.shards) != manifest.count:
        raise BadFile(f"{path}: count = {manifest.count}, but its shards hold another number")
    return manifest


def _from_json(raw: Mapping[str, Any]) -> FeatureManifest:
    shards = tuple(ShardEntry(**shard) for shard in raw["shards"])
    if any(type(n) is not int or n < 0 for shard in shards for n in (shard.count, shard.bytes)):
        raise ValueError("a shard's count and bytes must be whole numbers that are not negative")
    lists: dict[str, Any] = {"shape": tuple(raw["shape"]), "shards": shards, "flops": float(raw["flops"])}
    return FeatureManifest(**{**raw, **lists})


def _layout(folder: Path, shard: ShardEntry, manifest: FeatureManifest) -> dict[str, Entry]:
    """Where a shard's tensors lie, checked against the manifest."""
    path = inside(folder, shard.file)
    if not path.is_file() or path.stat().st_size != shard.bytes:
        raise BadFile(f"{path}: missing or not {shard.bytes} bytes, as the manifest says")
    layout = read_header(path)
    dtype = DTYPES[manifest.dtype][0]
    expected = {"features": (dtype, (shard.count, *manifest.shape)), "crc32": ("U32", (shard.count,))}
    found = {name: (entry.dtype, entry.shape) for name, entry in layout.items()}
    if found != expected:
        raise BadFile(f"{path}: holds {found}; the manifest asks for {expected}")
    return layout


def open_features_of(stage: Stage, recipe: Recipe, records: RecordSet) -> list[FeatureSet]:
    """The features that a stage learns from, of each encoder; UserError where one lacks or doesn't fit the model."""
    side, method = recipe.model.latent_size // recipe.model.patch, stage.method
    found = [open_features(Path(recipe.data.path), name, records) for name in method.encoder_names]
    for one in found:
        check_grid(one.manifest.encoder, one.manifest.shape[:2], side, method.resizes_features, stage.name)
    return found
