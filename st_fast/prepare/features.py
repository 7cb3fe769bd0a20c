"""The images that a set's latents were made from, by record number, and features of them in shards beside the latents.

Record i of a set with flips is image i // 2, mirrored if i is odd; images that were left out when the latents were made
are left out here. An image is the same crop that the VAE saw, and follows from the record's number alone. Features are
written a shard at a time, continued if interrupted: shard k is made by process k mod world alone, and the process that
finds all shards complete writes the manifest.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import make_folder, read_json
from st_fast.core.machine import local_count, usable_cpus
from st_fast.core.progress import bar
from st_fast.data.ahead import Readable, ReadAhead, RecordSet
from st_fast.data.buckets import one_shape
from st_fast.data.features import FeatureManifest, features_folder
from st_fast.data.images import BadImage, center_crop, decode_image
from st_fast.data.layouts.repa import RepaSet, has_layout, repa_images
from st_fast.data.manifest import crop_of, is_upright, write_manifest
from st_fast.data.source import Source, numbered_by
from st_fast.data.sources import open_source
from st_fast.evaluate.classifier import read_images
from st_fast.model.encoders import ImageEncoder
from st_fast.model.vae import PRESETS
from st_fast.prepare.job import SKIPPED_FILE, Progress, check_begun, reopened
from st_fast.prepare.writing import all_finished, finished, record_crcs, write_noted

KEPT_FILE = "images.safetensors"
"""Images as tensors, which a data folder may hold: those of the digits are the records' own."""
SHARD_BYTES = 2**28


class ImageLayout(NamedTuple):
    """Shape (C, S, S), C = 1 or 3, and dtype of one image, for `ReadAhead`."""

    shape: tuple[int, ...]
    dtype: str = "uint8"


class SourceImages:
    """The images of a set's records, from the source that the set was made from (see `RecordImages`).

    UserError for another source: one with another number of usable images, or other labels.
    """

    def __init__(self, source: Source, records: RecordSet, size: int, exact: bool = False) -> None:
        """exact: images must have that size already, since it is only the first one's."""
        self.source, self.size, self.exact, self.views = source, size, exact, 2 if records.manifest.flip else 1
        self.upright = is_upright(records.manifest.source)
        self.manifest, self.labels, self.digest = ImageLayout((3, size, size)), records.labels, source.digest()
        if crop_of(records.manifest.source) not in (None, size):
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

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads images of records `indices` (n,) into out, uint8 (n, 3, size, size)."""
        for record, row in zip(indices.tolist(), out, strict=True):
            number = int(self.numbers[record // self.views])
            try:
                image = self._pixels(number)
            except (UserError, OSError) as error:
                raise UserError(f"{self.source.names[number]!a}: can't be used, but has a latent ({error})") from None
            row[:] = image[:, :, ::-1] if record % self.views else image

    def _pixels(self, number: int) -> np.ndarray:
        image = decode_image(self.source.read(number), 3, self.upright)
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
        if self.views * len(every) != len(records):  # the set is older than the list of skipped images
            with ThreadPoolExecutor(max(2, usable_cpus()), "st_fast images") as pool:
                usable = list(bar(pool.map(self._usable, every.tolist()), "looking", len(every), "image"))
            every = every[usable]
        if (count := self.views * len(every)) != len(records):
            raise UserError(
                f"{self.source.description}: {count} images with their mirrored ones, {len(records)} latents"
            )
        return every

    def _usable(self, number: int) -> bool:
        try:
            self._pixels(number)
        except (UserError, OSError):
            return False
        return True


class KeptImages:
    """Images in `images.safetensors` beside the latents, one a record in the records' order (see `RecordImages`)."""

    def __init__(self, folder: Path, records: RecordSet) -> None:
        real = read_images(folder)
        if not np.array_equal(real.train_labels.numpy(), records.labels):
            raise UserError(
                f"{folder / KEPT_FILE}: {len(real.train)} training images, not one for each of {len(records)} latents "
                "with its label; name the source that the latents were made from instead"
            )
        self.pixels, self.labels, self.digest = real.train.numpy(), records.labels, real.digest
        self.manifest = ImageLayout(self.pixels.shape[1:])

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Reads images of records `indices` (n,) into out, uint8 (n, C, S, S)."""
        out[:] = self.pixels[indices]


RecordImages = SourceImages | KeptImages
"""Images by record number, which `ReadAhead` reads as it reads latents. UserError names an unusable image.

Their digest changes when the images' names or labels do; the content of a source's images is not read for it.
"""


def open_record_images(
    folder: Path, records: RecordSet, images: str, subset: str, size: int | None = None
) -> RecordImages:
    """The images of the records in `folder`; `images` is their source, or "" for images in the folder.

    size: of the crop, where the caller knows it; else the manifest's, else that of the images or latents. UserError
    where they can't be found or are others, or are no squares, which alone image encoders take.
    """
    _, height, width = one_shape(records, "an image encoder").manifest.shape
    crop = crop_of(records.manifest.source)
    if height != width or isinstance(crop, tuple):
        raise UserError(f"{folder}: latents of {height} x {width}: image encoders take square images")
    if not images and not has_layout(folder) and not (folder / KEPT_FILE).is_file():
        raise UserError(
            f"data.images is empty, and {folder} holds no images: give the folder or archive that was given to "
            "python -m st_fast.prepare"
        )
    where = Path(images or folder)
    if (where / KEPT_FILE).is_file():
        return KeptImages(where, records)
    if has_layout(where):
        source = repa_images(records if isinstance(records, RepaSet) else RepaSet(where))
    else:
        source = open_source(where, subset, **reopened(folder, records.manifest))
    if records.manifest.class_names and not has_layout(where):
        source = numbered_by(source, records.manifest.class_names, records.manifest.num_classes)
    known = size or crop
    return SourceImages(source, records, known) if known else SourceImages(source, records, *_side(source, records))


def _side(source: Source, records: RecordSet) -> tuple[int, bool]:
    """The side of the crop, and whether all images must have it: the first one's, where that is square.

    Else that of the latents of a Stable Diffusion VAE, which are an eighth of it.
    """
    try:
        width, height = decode_image(source.read(0), 3).size
    except (UserError, OSError) as error:
        raise UserError(f"{source.names[0]!a}: can't be used ({error})") from None
    if width == height:
        return width, True
    if records.manifest.vae.name in PRESETS:
        return 8 * records.manifest.shape[-1], False
    raise UserError(
        f"{source.names[0]!a}: {width} x {height} pixels, and the latents don't say how they were cropped: square "
        "images are needed"
    )


def template(encoder: ImageEncoder, records: RecordSet, size: int) -> FeatureManifest:
    """The manifest without its shards."""
    count, grid = len(records), encoder.grid(size)
    return FeatureManifest(
        encoder.name, encoder.hash, (*grid, encoder.width), size, records.digest, count, count * encoder.flops(size)
    )


def write_features(
    data: Path, records: RecordSet, encoder: ImageEncoder, images: Readable, batch: int = 32,
    share: slice = slice(None), progress: Progress = lambda records: None,
) -> None:  # fmt: skip
    """Writes the missing ones of this process's shards, and the manifest if all shards of all processes are there.

    UserError where the folder was begun with another encoder or for other latents.
    """
    planned, folder = template(encoder, records, images.manifest.shape[-1]), features_folder(data, encoder.name)
    make_folder(folder)
    job = asdict(planned) | {"shape": list(planned.shape), "shards": []}
    check_begun(folder, job, "remove the folder to write them anew")
    rows = max(1, SHARD_BYTES // planned.record_bytes)
    parts = [np.arange(start, min(start + rows, len(records))) for start in range(0, len(records), rows)]
    notes = [folder / f"features-{number:05d}.json" for number in range(len(parts))]
    threads = max(2, usable_cpus() // local_count())
    reader = ReadAhead(images, threads, depth=threads)
    for part, note in list(zip(parts, notes, strict=True))[share]:
        if finished(note):
            progress(len(part))
            continue
        found = []
        for pixels, _ in reader.stream(part[start : start + batch] for start in range(0, len(part), batch)):
            found.append(encoder(pixels).cpu().half().numpy())
            if not np.isfinite(found[-1]).all():
                raise UserError(f"encoder {encoder.name}: features that float16 can't hold (NaN, Inf or above 65504)")
            progress(len(pixels))
        features = np.concatenate(found)
        tensors = {"features": features, "crc32": record_crcs(features, part)}
        write_noted(note, tensors)
    reader.close()
    if entries := all_finished(notes):
        write_manifest(folder, replace(planned, shards=entries))
