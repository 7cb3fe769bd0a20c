"""MAR's latents: one folder a class, an .npz an image with `moments` and `moments_flip`, of the mirrored image.

Both are (mean, log-variance) of the KL-16 VAE, unscaled and not yet clamped; the model's latent is 0.2325 times the
sample (LTH14/mar, main_cache.py and engine_mar.py).
"""

import os
from itertools import islice
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile
from st_fast.core.limits import Zip, npy_header
from st_fast.data.layouts.records import (
    ForeignRecords,
    fill,
    floats_of,
    made_manifest,
    short_digest,
)
from st_fast.data.manifest import VaeInfo

VAE, CHANNELS, FACTOR, SCALE = "xwen99/mar-vae-kl16", 16, 16, 0.2325
VIEWS = ("moments", "moments_flip")
LOOKED_AT = 64
"""Entries of a class's folder that are looked at to see whether it holds such files."""


def is_mar(folder: Path, names: list[str]) -> bool:
    """Whether a folder is MAR's: .npz files in folders; `BadFile` where they lie in no folder, so have no class."""
    if any(name.endswith(".npz") and _has_moments(folder / name) for name in names[:LOOKED_AT]):
        raise BadFile(f"{folder}: MAR's .npz of moments, but in no folder of their class; name the folder above them")
    for name in sorted(names)[:LOOKED_AT]:
        if (folder / name).is_dir():
            with os.scandir(folder / name) as entries:
                found = [entry.path for entry in islice(entries, LOOKED_AT) if entry.name.endswith(".npz")]
            if found:
                return _has_moments(Path(found[0]))
    return False


def _has_moments(path: Path) -> bool:
    """Whether an .npz has moments in it."""
    with Zip(path) as archive:
        return any(f"{name}.npy" in archive.NameToInfo for name in VIEWS)


class MarSet(ForeignRecords):
    """The records: 2i is image i, 2i + 1 the mirrored image i, by class and name. They are read as (mean, std)."""

    scale_of = "project"
    usual = f"MAR's makes {CHANNELS}"

    def __init__(self, folder: Path, threads: int = 8) -> None:
        self.folder = Path(folder)
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        self._images, labels = list[str](), list[np.ndarray]()
        for number, name in enumerate(classes):
            with os.scandir(self.folder / name) as entries:
                found = sorted(f"{name}/{entry.name}" for entry in entries if entry.name.endswith(".npz"))
            if not found:
                raise BadFile(f"{self.folder / name}: no .npz in it, and each folder is a class; remove it")
            self._images += found
            labels.append(np.full(len(found), number, np.int64))
        self.labels = np.repeat(np.concatenate(labels), 2)
        self.names = self._images
        self.open_files(self.folder, threads)
        first = self.folder / self._images[0]
        shape = floats_of_npz(first, VIEWS[0])
        known = shape[0] == 2 * CHANNELS
        self.manifest = made_manifest(
            first,
            count=len(self.labels),
            shape=shape,
            dtype="float32",
            scale=SCALE,
            vae=VaeInfo(VAE if known else "", factor=FACTOR if known else 0),
            source=f"MAR's layout, names {short_digest(repr((name,)).encode() for name in self._images)}",
            num_classes=len(classes),
            flip=True,
            class_names=tuple(classes),
            shift=0.0,
        )
        self.settle_kind()

    def where(self, index: int) -> str:
        """A record's file, and its name in it."""
        return f"{self.folder / self._images[index // 2]}: {VIEWS[index % 2]}"

    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads the moments (2C, H, W) of one image or its mirror."""
        path, view = self.folder / self._images[index // 2], VIEWS[index % 2]
        with Zip(path) as archive:
            if f"{view}.npy" not in archive.NameToInfo:
                raise BadFile(f"{path}: no {view} in it; MAR's files have {' and '.join(VIEWS)}")
            fill(row, archive.array(view, row.nbytes + LIMIT), self.where(index))


LIMIT = 2**16
"""Bytes that an array's header may add to its content."""


def floats_of_npz(path: Path, name: str) -> tuple[int, int, int]:
    """The shape of an array in an .npz."""
    with Zip(path) as archive:
        if f"{name}.npy" not in archive.NameToInfo:
            raise BadFile(f"{path}: no {name} in it; MAR's files have {' and '.join(VIEWS)}")
        info = archive.NameToInfo[f"{name}.npy"]
        with archive.reading(info) as file:
            return floats_of(npy_header(file, f"{path}: {name}"), info.file_size, f"{path}: {name}")
