"""Features of image encoders beside the latents: one row a record, in the records' order, in shards of their own.

They lie in DATA/features/<encoder's last name>/ with a manifest.json that names the encoder, the hash of its weights,
the grid, and the digest of the latents they belong to. The latents' own manifest stays as it is, and with it every run
that was started on them. Every row is checked against its CRC whenever it is read.
"""

from dataclasses import dataclass
from pathlib import Path

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, sha256_file, shown
from st_fast.data.ahead import RecordSet
from st_fast.data.manifest import FILE_NAME, ShardedSet, ShardEntry, parse_manifest
from st_fast.data.shards import CheckedRows
from st_fast.recipe.schema import Recipe, Stage

FORMAT = "st_fast.features"
FOLDER = "features"
SMALL, SMALL_ENCODER = "small", "small-encoder"
"""The option's value that trains a small encoder on a set's images, and that encoder's name in recipes."""


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
    """FLOPs of computing all of them."""
    dtype: str = "float16"
    shards: tuple[ShardEntry, ...] = ()
    format: str = FORMAT
    version: int = 1

    def problem(self) -> str:
        """The first inconsistency, or ""."""
        wrong = "" if self.flops >= 0 and self.size >= 1 else f"flops = {self.flops}, size = {self.size}: too small"
        return super().problem() or wrong


class FeatureSet(CheckedRows):
    """Features that can be read by record index. Open with `open_features`."""

    def __init__(self, folder: Path, manifest: FeatureManifest) -> None:
        super().__init__(folder, manifest, "features", ("crc32",))
        self.manifest = manifest

    def verify(self) -> None:
        """Compares every shard with its SHA-256; `BadFile` names the first that differs."""
        for shard in self.manifest.shards:
            if sha256_file(self.folder / shard.file) != shard.sha256:
                raise BadFile(f"{self.folder / shard.file}: its SHA-256 isn't the manifest's: it was changed")


def features_folder(data: Path, encoder: str) -> Path:
    """The folder of an encoder's features, named by the last part of a hub name or by a folder's name."""
    return Path(data) / FOLDER / Path(encoder).name


def open_features(data: Path, encoder: str, records: RecordSet) -> FeatureSet:
    """An encoder's features of these records. UserError if there are none, `BadFile` if they are of other records."""
    folder = features_folder(data, encoder)
    if not (folder / FILE_NAME).is_file():
        given = SMALL if encoder == SMALL_ENCODER else encoder
        raise UserError(
            f"{folder}: no complete features of {encoder}; write them with "
            f"python -m st_fast.prepare --features {given} IMAGES {data}"
        )
    manifest = parse_manifest(FeatureManifest, folder / FILE_NAME)
    if encoder not in (manifest.encoder, Path(manifest.encoder).name) and Path(encoder).name != manifest.encoder:
        raise UserError(f"{folder}: features of {shown(manifest.encoder)}; the recipe names {encoder!r}")
    if (manifest.latents, manifest.count) != (records.digest, len(records)):
        raise BadFile(
            f"{folder}: features of {manifest.count} other records than the {len(records)} in {data}; "
            "remove the folder and write them again"
        )
    return FeatureSet(folder, manifest)


def check_grid(encoder: str, grid: tuple[int, int], ours: tuple[int, int], interpolate: bool, stage: str) -> None:
    """UserError, naming both, where the features' grid is not that of the model's tokens."""
    if grid != ours and not interpolate:
        raise UserError(
            f"stage.{stage}: {encoder} has a grid of {grid[0]} x {grid[1]} patches, the model one of "
            f"{ours[0]} x {ours[1]} tokens; interpolate = true in this stage resizes the features"
        )


def open_features_of(stage: Stage, recipe: Recipe, records: RecordSet) -> list[FeatureSet]:
    """The features that a stage learns from, of each encoder; UserError where one is missing or doesn't fit."""
    method = stage.method
    found = [open_features(Path(recipe.data.path), name, records) for name in method.encoder_names]
    for one in found:
        check_grid(one.manifest.encoder, one.manifest.shape[:2], recipe.model.grid, method.resizes_features, stage.name)
    return found
