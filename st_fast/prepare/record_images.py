"""The images that a set's latents were made from, by record number: what image encoders see, before or during training.

Record i of a set with flips is image i // 2, mirrored if i is odd; images that were left out when the latents were made
are left out here. An image is the same crop that the VAE saw, and follows from the record's number alone.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import read_json
from st_fast.core.machine import usable_cpus
from st_fast.core.progress import bar
from st_fast.data.images import BadImage, center_crop, decode_image
from st_fast.data.repa import RepaSet, is_repa, repa_images
from st_fast.data.shards import RecordSet
from st_fast.data.sources import Source, open_source
from st_fast.evaluate.classifier import read_images
from st_fast.model.vae import PRESETS
from st_fast.prepare.job import SKIPPED_FILE

KEPT_FILE = "images.safetensors"
"""Images as tensors, which a data folder may hold: those of the digits are the records' own."""


@dataclass(frozen=True)
class ImageLayout:
    """What one image is, as `ReadAhead` asks for it."""

    shape: tuple[int, int, int]
    """(C, S, S), C = 1 or 3."""
    dtype: str = "uint8"


class RecordImages(Protocol):
    """Images by record number; `ReadAhead` reads them as it reads latents."""

    manifest: ImageLayout
    labels: np.ndarray
    digest: str
    """Changes when the images' names or labels do; their content is not read for it."""

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads images of records `indices` (n,) into out, uint8 (n, C, S, S). May be called from many threads.

        UserError names an image that can't be used though it has a latent.
        """
        ...


class SourceImages:
    """The images of a set's records, out of the source that the set was made from (see `RecordImages`).

    UserError where the source can't be that: another number of usable images, or other labels.
    """

    def __init__(self, source: Source, records: RecordSet, size: int, exact: bool = False) -> None:
        self.source, self.size, self.views = source, size, 2 if records.manifest.flip else 1
        self.exact = exact
        """Whether images must have that size already: where it is nothing but the first one's."""
        self.manifest, self.labels, self.digest = ImageLayout((3, size, size)), records.labels, source.digest()
        made = crop_of(records.manifest.source)
        if made not in (None, size):
            raise UserError(f"--size {size}: the latents are of {records.manifest.source!r}; give the same size")
        self.numbers = self._numbers(records)
        labels = np.repeat(source.labels[self.numbers], self.views)
        wrong = np.flatnonzero(labels != records.labels)
        if len(wrong):
            at = wrong[0]
            raise UserError(
                f"{source.description}: not what the latents were made from: record {at} has label "
                f"{records.labels[at]}, its image {labels[at]}"
            )

    def __call__(self, records: np.ndarray) -> Tensor:
        """uint8 (n, 3, size, size), read on as many threads as there are processors."""
        out = np.empty((len(records), *self.manifest.shape), np.uint8)
        with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
            for _ in pool.map(self._load, records.tolist(), out):
                pass
        return torch.from_numpy(out)

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """See `RecordImages`."""
        for record, row in zip(indices.tolist(), out, strict=True):
            self._load(record, row)

    def _load(self, record: int, row: np.ndarray) -> None:
        number = int(self.numbers[record // self.views])
        try:
            image = self._pixels(number)
        except (BadImage, OSError) as error:
            raise UserError(f"{self.source.names[number]!a}: can't be used, but has a latent ({error})") from None
        row[:] = image[:, :, ::-1] if record % self.views else image

    def _pixels(self, number: int) -> np.ndarray:
        image = decode_image(self.source.read(number), 3)
        if self.exact and image.size != (self.size, self.size):
            raise BadImage(f"{image.width} x {image.height} pixels, {self.size} x {self.size} needed")
        return center_crop(image, self.size).transpose(2, 0, 1)

    def _numbers(self, records: RecordSet) -> np.ndarray:
        """The source's numbers of the images that have latents."""
        every = np.arange(len(self.source.names))
        folder = getattr(records, "folder", None)
        if folder is not None and (folder / SKIPPED_FILE).is_file():
            skipped = read_json(folder / SKIPPED_FILE)
            every = every[[name not in skipped for name in self.source.names]]
        if self.views * len(every) != len(records):  # made before the left-out ones were written down
            with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
                usable = list(bar(pool.map(self._usable, every.tolist()), "looking", len(every), "images"))
            every = every[usable]
        if self.views * len(every) != len(records):
            count = self.views * len(every)
            raise UserError(
                f"{self.source.description}: {count} images with their mirrored ones, {len(records)} latents"
            )
        return every

    def _usable(self, number: int) -> bool:
        try:
            self._pixels(number)
        except (BadImage, OSError):
            return False
        return True


class KeptImages:
    """Images that lie in `images.safetensors` beside the latents, one a record in the records' order."""

    def __init__(self, folder: Path, records: RecordSet) -> None:
        real = read_images(folder)
        if not np.array_equal(real.train_labels.numpy(), records.labels):
            raise UserError(
                f"{folder / KEPT_FILE}: {len(real.train)} training images, not one for each of {len(records)} latents "
                "with its label; name what the latents were made from instead"
            )
        self.pixels, self.labels, self.digest = real.train.numpy(), records.labels, real.digest
        self.manifest = ImageLayout(tuple(self.pixels.shape[1:]))

    def __call__(self, records: np.ndarray) -> Tensor:
        """uint8 (n, C, S, S)."""
        return torch.from_numpy(self.pixels[records])

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """See `RecordImages`."""
        out[:] = self.pixels[indices]


def crop_of(source: str) -> int | None:
    """The side of the centre crop that latents were made of, where the `source` of their manifest tells."""
    found = re.search(r"centre crop (\d+)$", source)
    return int(found[1]) if found else None


def open_record_images(
    folder: Path, records: RecordSet, images: str, subset: str, size: int | None = None
) -> SourceImages | KeptImages:
    """The images of the records in `folder`; `images` is what they were made from, or "" for images in the folder.

    size: of the crop, where the caller knows it; else the manifest's, else what the images and latents tell. UserError
    where they can't be found or are others.
    """
    if not images and is_repa(folder):
        images = str(folder)
    if not images and not (folder / KEPT_FILE).is_file():
        raise UserError(
            f"data.images is empty, and {folder} holds no images: give the folder or archive that was given to "
            "python -m st_fast.prepare"
        )
    where = Path(images or folder)
    if (where / KEPT_FILE).is_file():
        return KeptImages(where, records)
    if is_repa(where):
        repa = records if isinstance(records, RepaSet) else RepaSet(where)
        source = repa_images(repa)
    else:
        source = open_source(where, subset)
    known = size or crop_of(records.manifest.source)
    return SourceImages(source, records, known) if known else SourceImages(source, records, *_side(source, records))


def _side(source: Source, records: RecordSet) -> tuple[int, bool]:
    """The side of the crop, and whether all images must have it: the first one's, where that is square.

    Else that of the latents of a Stable Diffusion VAE, which are an eighth of it.
    """
    try:
        width, height = decode_image(source.read(0), 3).size
    except (BadImage, OSError) as error:
        raise UserError(f"{source.names[0]!a}: can't be used ({error})") from None
    if width == height:
        return width, True
    if records.manifest.vae.name in PRESETS:
        return 8 * records.manifest.shape[-1], False
    raise UserError(
        f"{source.names[0]!a}: {width} x {height} pixels, and the latents don't say how they were cropped: square "
        "images are needed"
    )
