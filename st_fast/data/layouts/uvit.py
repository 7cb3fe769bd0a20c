"""U-ViT's features of ImageNet: {i}.npy with an array of two Python objects, moments (2C, H, W) and a label.

Moments are (mean, log-variance) of Stable Diffusion's VAE, not yet clamped; the model's latent is 0.18215 times the
sample (arXiv 2209.12152, scripts/extract_imagenet_feature.py). Each batch of 256 images is followed by its mirror
images. The pickle in a file is never executed: `pickled_arrays` finds the two numbers' places in it.
"""

import os
import re
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, open_regular, read_bytes, shown
from st_fast.core.limits import Npy
from st_fast.core.pickled_arrays import array_places
from st_fast.data.labels import MAX_CLASSES
from st_fast.data.layouts.npy import read_small_files
from st_fast.data.layouts.records import (
    SD_SCALE,
    ForeignRecords,
    check_labels,
    fill,
    floats_of,
    made_manifest,
    short_digest,
)
from st_fast.data.manifest import VaeInfo

VAE, CHANNELS, FACTOR = "sd-vae-ft-ema", 4, 8
"""A decoder for the latents: all of Stable Diffusion 1's VAEs have one encoder."""
START = re.compile(rb"\x93NUMPY[\x01\x02]\x00(?:..|....)\{'descr': '\|?O'", re.S)
NUMBERED = re.compile(r"(0|[1-9]\d{0,8})\.npy")
FILE_BYTES = 2**26


def is_uvit(folder: Path, names: list[str]) -> bool:
    """Whether a folder is U-ViT's; `BadFile` for other numbered arrays, which have no labels beside them."""
    first = folder / "0.npy"
    if not first.is_file():
        return False
    with open_regular(first) as file:
        start = bytes(file.read(256))
    if START.match(start):
        return True
    shape = re.search(rb"'shape': \(([\d, ]*)\)", start)
    found = f"({shape[1].decode()})" if shape else "no array"
    raise BadFile(
        f"{folder}: numbered .npy files without labels (0.npy is {found}); U-ViT's of ImageNet hold moments and label, "
        "U-ViT's of COCO have 0_0.npy and more with their captions' states, fast-DiT's lie in NAME_features beside "
        "NAME_labels"
    )


class UvitSet(ForeignRecords):
    """The records by number, read as (mean, std)."""

    scale_of = "project"
    usual = f"U-ViT's makes {CHANNELS}"

    def __init__(self, folder: Path, threads: int = 8) -> None:
        self.folder = Path(folder)
        with os.scandir(folder) as entries:
            numbers = {int(match[1]) for entry in entries if (match := NUMBERED.fullmatch(entry.name))}
        if missing := next((number for number in range(len(numbers)) if number not in numbers), None):
            raise BadFile(f"{self.folder / f'{missing}.npy'}: missing, with {len(numbers)} files in the folder")
        self.names = [f"{number}.npy" for number in range(len(numbers))]
        first = self.folder / self.names[0]
        data = read_bytes(first, FILE_BYTES)
        place, label = _places(data, first)
        shape = floats_of(place, place.start + place.size, first)
        self.open_files(self.folder, threads)
        self._label = label
        rows = read_small_files(self.folder, self.names, len(data), label.start, label.dtype.itemsize, self._pool)
        self.labels = rows.view(label.dtype)[:, 0].astype(np.int64)
        check_labels(self.labels, MAX_CLASSES, self.where)
        known = shape[0] == 2 * CHANNELS
        self.manifest = made_manifest(
            first,
            count=len(self.names),
            shape=shape,
            dtype="float32",
            scale=SD_SCALE,
            vae=VaeInfo(VAE if known else "", factor=FACTOR if known else 0),
            source=f"U-ViT's layout of ImageNet, labels {short_digest([self.labels.tobytes()])}",
            num_classes=int(self.labels.max()) + 1,
            shift=0.0,
        )
        self.settle_kind()

    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads the moments (2C, H, W) of one file, whose label must be the one that was read at the beginning."""
        path = self.folder / self.names[index]
        data = read_bytes(path, FILE_BYTES)
        place, label = _places(data, path)
        if place.shape != row.shape or (label.start, label.dtype) != (self._label.start, self._label.dtype):
            raise BadFile(
                f"{path}: {place.dtype} {shown(place.shape)} and a label at byte {label.start}; {self.names[0]} has "
                f"{shown(row.shape)} and {self._label.start}"
            )
        if int(taken(data, label)[()]) != self.labels[index]:
            raise BadFile(f"{path}: its label is another than when the set was opened")
        fill(row, taken(data, place), path)


def _places(data: bytes, where: object) -> tuple[Npy, Npy]:
    """Where moments and label stand in a file."""
    start = 8 + (2 if data[6:7] == b"\1" else 4)
    start += int.from_bytes(data[8:start], "little")
    if not START.match(data[:256]) or start > len(data):
        raise BadFile(f"{where}: not an array of Python objects, as U-ViT's files of ImageNet are")
    found = array_places(data[start:], where)
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(place, Npy) for place in found):
        raise BadFile(f"{where}: not (moments, label), as U-ViT's files of ImageNet are")
    moments, label = (place._replace(start=place.start + start) for place in found)
    if label.shape != () or label.dtype.kind != "i":
        raise BadFile(f"{where}: its label is {label.dtype} {shown(label.shape)}; one whole number is needed")
    return moments, label


def taken(data: bytes, place: Npy) -> np.ndarray:
    """The array at a place in bytes."""
    flat = np.frombuffer(data, place.dtype, int(np.prod(place.shape)), place.start)
    return flat.reshape(place.shape, order="F" if place.fortran else "C")
