"""fast-DiT's latents: a folder with NAME_features/{i}.npy (1, C, H, W) and NAME_labels/{i}.npy (1,).

A latent was drawn once from the VAE's posterior and multiplied by 0.18215 before it was written, so it is what the
model sees (chuanyangjin/fast-DiT, extract_features.py). Here the factor is divided out, and is the manifest's scale.
"""

import os
import re
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, open_regular, shown
from st_fast.core.limits import npy_header
from st_fast.data.labels import MAX_CLASSES
from st_fast.data.layouts.npy import read_npy_into, read_small_files
from st_fast.data.layouts.records import (
    LATENT,
    SD_SCALE,
    ForeignRecords,
    check_labels,
    floats_of,
    made_manifest,
    short_digest,
)
from st_fast.data.manifest import VaeInfo

FEATURES, LABELS = "_features", "_labels"
VAE, CHANNELS, FACTOR = "sd-vae-ft-ema", 4, 8
"""What fast-DiT encodes with unless it is told otherwise."""
NUMBERED = re.compile(r"(0|[1-9]\d{0,8})\.npy")
LABEL_BYTES = 4_096


def is_fast_dit(folder: Path, names: list[str]) -> bool:
    """Whether a folder is fast-DiT's; `BadFile` where labels are missing, or one of its two folders is named."""
    if folder.name.endswith(FEATURES) and (folder.parent / f"{folder.name.removesuffix(FEATURES)}{LABELS}").is_dir():
        raise BadFile(f"{folder}: fast-DiT's latents; name the folder above, which has their labels, too")
    sets = [name for name in sorted(names) if name.endswith(FEATURES) and (folder / name / "0.npy").is_file()]
    if not sets:
        return False
    if len(sets) > 1:
        raise BadFile(f"{folder}: {', '.join(map(shown, sets))}: fast-DiT's latents of one set a folder are needed")
    labels = sets[0].removesuffix(FEATURES) + LABELS
    if not (folder / labels).is_dir():
        raise BadFile(f"{folder}: fast-DiT's latents in {shown(sets[0])}, but no folder {shown(labels)} with labels")
    return True


class FastDitSet(ForeignRecords):
    """The records by number, with the scale divided out."""

    kind = LATENT
    scale_of = "files"
    usual = f"fast-DiT's makes {CHANNELS}"

    def __init__(self, folder: Path, threads: int = 8) -> None:
        self.folder = Path(folder)
        base = next(name for name in sorted(os.listdir(folder)) if name.endswith(FEATURES)).removesuffix(FEATURES)
        features, labels = self.folder / (base + FEATURES), self.folder / (base + LABELS)
        numbers, labelled = _numbers(features), _numbers(labels)
        if odd := sorted(numbers ^ labelled):
            found = f"{len(numbers)} latents, {len(labelled)} labels"
            lacking = labels if odd[0] in numbers else features
            raise BadFile(f"{self.folder}: {found}: {lacking.name}/{odd[0]}.npy is missing")
        order = sorted(numbers)
        self.names = [f"{number}.npy" for number in order]
        with open_regular(features / self.names[0]) as file:
            place = npy_header(file, features / self.names[0])
            size = os.fstat(file.fileno()).st_size
        if len(place.shape) != 4 or place.shape[0] != 1:
            raise BadFile(f"{features / self.names[0]}: {place.dtype} {shown(place.shape)}; (1, C, H, W) is needed")
        self._stored = place.dtype.name
        shape = floats_of(place, size, features / self.names[0], "(1, C, H, W)")
        self.open_files(features, threads)
        self.labels = self._labels(labels)
        known = shape[0] == CHANNELS
        self.manifest = made_manifest(
            features,
            count=len(order),
            shape=shape,
            dtype="float32",
            scale=SD_SCALE,
            vae=VaeInfo(VAE if known else "", factor=FACTOR if known else 0),
            source=f"fast-DiT's layout, numbers and labels "
            f"{short_digest([np.array(order, np.int64).tobytes(), self.labels.tobytes()])}",
            num_classes=int(self.labels.max()) + 1,
            shift=0.0,
            posterior="mean",
        )

    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads one latent (C, H, W), unscaled."""
        stored = np.empty((1, *row.shape), self._stored)
        read_npy_into(self.root / self.names[index], stored.shape, self._stored, stored)
        row[:] = stored[0].astype(np.float32) / np.float32(SD_SCALE)

    def _labels(self, folder: Path) -> np.ndarray:
        """(n,) int64: one small file each, of which the first one's header is that of all."""
        first = folder / self.names[0]
        with open_regular(first) as file:
            header = npy_header(file, first)
        if header.dtype not in (np.int64, np.int32) or header.shape not in ((1,), ()):
            raise BadFile(f"{first}: {header.dtype} {shown(header.shape)}; one whole number, the label, is needed")
        size = header.start + header.dtype.itemsize
        if size > LABEL_BYTES:
            raise BadFile(f"{first}: a header of {header.start} bytes; at most {LABEL_BYTES} are read for a label")
        rows = read_small_files(folder, self.names, size, 0, size, self._pool)
        wrong = np.flatnonzero((rows[:, : header.start] != rows[0, : header.start]).any(1))
        if len(wrong):
            raise BadFile(f"{folder / self.names[wrong[0]]}: another header than that of {self.names[0]}")
        labels = np.ascontiguousarray(rows[:, header.start :]).view(header.dtype)[:, 0].astype(np.int64)
        check_labels(labels, MAX_CLASSES, lambda row: folder / self.names[row])
        return labels


def _numbers(folder: Path) -> set[int]:
    """The numbers of a folder's files."""
    with os.scandir(folder) as entries:
        return {int(match[1]) for entry in entries if (match := NUMBERED.fullmatch(entry.name))}
