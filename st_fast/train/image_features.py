"""The image features that a stage learns from: read from files, or computed by encoders while it trains.

Either way they are one object, with what the trainer needs: their widths, their cost, their digests (so that a resumed
run learns from the same features) and the loaders that `BatchIterator` reads.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from st_fast.core.errors import UserError
from st_fast.core.machine import local_count, usable_cpus
from st_fast.data.ahead import ReadAhead, RecordSet
from st_fast.data.features import FeatureSet, check_grid, open_features_of
from st_fast.data.loader import Loader
from st_fast.model.compiling import CompiledBlocks
from st_fast.model.encoders import ImageEncoder, VisionTransformer, load_encoder
from st_fast.prepare.features import RecordImages, open_record_images
from st_fast.recipe.schema import Recipe, Stage

LIVE = "live:"
"""Prefix of the digests of live features."""


@dataclass(frozen=True)
class ImageFeatures:
    """A stage's image features; empty where its method learns from none."""

    written: tuple[FeatureSet, ...] = ()
    encoders: tuple[ImageEncoder, ...] = ()
    images: RecordImages | None = None
    """The input of live encoders."""
    latents: str = ""
    """Digest of the latents that the features belong to."""

    @property
    def widths(self) -> tuple[int, ...]:
        """D_j of each encoder."""
        return tuple(one.manifest.shape[-1] for one in self.written) + tuple(one.width for one in self.encoders)

    @property
    def flops_beforehand(self) -> float:
        """FLOPs of writing them, before any step."""
        return sum(one.manifest.flops for one in self.written)

    @property
    def flops_an_image(self) -> float:
        """FLOPs of the live encoders for an image."""
        return 0.0 if self.images is None else sum(one.flops(self.images.manifest.shape[-1]) for one in self.encoders)

    @property
    def digests(self) -> list[str]:
        """One per encoder; it changes with the features."""
        if self.images is None:
            return [one.manifest.digest for one in self.written]
        seen = (self.images.digest, self.images.manifest.shape, self.latents)
        return [f"{LIVE}{hashlib.sha256(repr((one.hash, seen)).encode()).hexdigest()}" for one in self.encoders]

    def check_same(self, saved: Sequence[str], where: str) -> None:
        """UserError if a run was started on other features than these.

        Changing between written and live ones, which differ at least in rounding, is allowed: it needed
        `--accept-changes`.
        """
        names = [str(one.folder) for one in self.written] or [f"encoder {one.name}" for one in self.encoders]
        for old, now, name in zip(saved, self.digests, names, strict=False):
            if old != now and old.startswith(LIVE) == now.startswith(LIVE):
                raise UserError(
                    f"{name}: the features changed since {where} was written (digest {old[-64:][:12]} then, "
                    f"{now[-64:][:12]} now); restore them, or start a new run"
                )

    def loaders(self, device: torch.device) -> list[Loader]:
        """One for each set of written features, or one for the images, with as many threads as a rank has CPUs."""
        if self.images is None:
            return [ReadAhead(one, pinned=device.type == "cuda") for one in self.written]
        threads = max(2, usable_cpus() // local_count())
        return [ReadAhead(self.images, threads, depth=threads, pinned=device.type == "cuda")]

    def close(self) -> None:
        """Closes the written features' files."""
        for one in self.written:
            one.close()


def open_image_features(
    stage: Stage, recipe: Recipe, records: RecordSet, device: torch.device, dtype: torch.dtype
) -> ImageFeatures:
    """The features of a stage; UserError where something is missing or does not fit the model or the latents."""
    method = stage.method
    if not method.encodes_images:
        return ImageFeatures(written=tuple(open_features_of(stage, recipe, records)))
    data = recipe.data
    images = open_record_images(Path(data.path), records, data.images, data.images_subset)
    # A folder of that name in the data folder comes first: the digits have their encoder there.
    own = {name: Path(data.path) / name for name in method.encoder_names}
    folders = (str(path) if (path / "config.json").is_file() else name for name, path in own.items())
    encoders = tuple(load_encoder(folder, device, dtype) for folder in folders)
    for one in encoders:
        grid = one.grid(images.manifest.shape[-1])
        check_grid(one.name, grid, recipe.model.latent_size // recipe.model.patch, method.resizes_features, stage.name)
    return ImageFeatures(encoders=encoders, images=images, latents=records.digest)


def compile_encoders(features: ImageFeatures, say: Callable[[str], None]) -> None:
    """Runs the vision transformers among the live encoders compiled from now on."""
    for one in features.encoders:
        if isinstance(one, VisionTransformer):
            one.run = CompiledBlocks(say, dynamic=False)
