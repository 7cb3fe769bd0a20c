"""REPA's folder of latents, read in place and written: `vae-sd/` with img-mean-std-*.npy and dataset.json.

Every file holds one image's concat(mean, std), unscaled (arXiv 2410.06940, preprocessing/). There are no hashes in
this layout: `prepare --from-repa` makes shards, which have them and are read faster.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, open_regular, read_bytes, shown
from st_fast.core.records import record_from
from st_fast.data.images import SUFFIXES
from st_fast.data.labels import LABELS_FILE, parse_labels_file, read_labels
from st_fast.data.layouts.npy import NpyRecords, read_npy_header
from st_fast.data.layouts.records import SD_SCALE, STD, kind_of
from st_fast.data.manifest import FILE_NAME, Manifest, VaeInfo, labels_problem
from st_fast.data.source import Source

LATENTS, IMAGES = "vae-sd", "images"
ASSUMED, ASSUMED_CHANNELS = "sd-vae-ft-mse", 4
"""The VAE that REPA's code uses, and the channels of its latents: what is taken for true where nothing is said."""
OURS = "st_fast"
"""The key of dataset.json with an `Origin`; REPA's loader reads "labels" alone."""


@dataclass(frozen=True)
class Origin:
    """What REPA's layout has no place for, as `prepare --to-repa` writes it: what the latents are of."""

    channels: int
    scale: float
    vae: VaeInfo
    """Its `path`, if any, is within the folder that holds vae-sd/."""
    num_classes: int
    class_names: tuple[str, ...] = ()


def has_layout(folder: Path) -> bool:
    """Whether a folder has REPA's layout in it, whatever else it holds."""
    return (Path(folder) / LATENTS / LABELS_FILE).is_file()


def is_repa(folder: Path) -> bool:
    """Whether a folder of latents is read as REPA's layout; a manifest of ours beside it is what counts."""
    return has_layout(folder) and not os.path.lexists(Path(folder) / FILE_NAME)


class RepaSet(NpyRecords):
    """The records of a folder in REPA's layout, sorted by file name. Its digest covers names and labels only.

    `files` covers the rest: sizes and times of the files from the start, and their content once it was verified.
    """

    usual = f"{ASSUMED}, assumed then, makes {ASSUMED_CHANNELS}"

    def __init__(self, folder: Path, threads: int = 4) -> None:
        self.folder = Path(folder)
        path = self.folder / LATENTS / LABELS_FILE
        with open_regular(path) as file:
            data = file.read()
        document = parse_labels_file(data, str(path))
        table = read_labels(document, str(path))
        self.origin = record_from(Origin, document[OURS], f"{path}: {OURS}", False) if OURS in document else None
        """What made the latents, where the folder says so."""
        self.names = sorted(table)
        self.labels = np.array([table[name] for name in self.names], np.int64)
        escaping = next((n for n in self.names if n.startswith("/") or ".." in n.split("/") or "\0" in n), None)
        if escaping is not None:
            raise BadFile(f"{path}: the path {shown(escaping)} in it must stay inside the folder")
        counts = {"latents": _count(self.folder / LATENTS, (".npy",)), "labels": len(table)}
        if (self.folder / IMAGES).is_dir():
            counts["images"] = _count(self.folder / IMAGES, SUFFIXES)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{number} {kind}" for kind, number in counts.items())
            raise BadFile(f"{self.folder}: {found}: these must be equally many")
        shape, dtype = read_npy_header(self.folder / LATENTS / self.names[0])[:2] if table else ((2, 1, 1), "float32")
        source = f"REPA layout, {LABELS_FILE} with SHA-256 {hashlib.sha256(data).hexdigest()}"
        told = self.origin or Origin(shape[0] // 2, SD_SCALE, VaeInfo(ASSUMED), int(self.labels.max(initial=0)) + 1)
        if told.channels != shape[0] // 2 and table:
            raise BadFile(f"{path}: {OURS}: channels = {told.channels}, but the latents have {shape[0] // 2}")
        if problem := labels_problem(self.labels, told.num_classes):
            raise BadFile(f"{path}: {shown(self.names[problem[0]])}: {problem[1]}")
        try:
            self.manifest = Manifest(
                len(table), shape, dtype, told.scale, told.vae, source, told.num_classes, False, told.class_names
            )
        except BadFile as error:
            raise BadFile(f"{path}: {error}") from None
        self.scale_of = "vae" if self.origin is None else "files"
        self.open_files(self.folder / LATENTS, threads)
        _ = self.files  # all that dataset.json names are there

    def unknown(self) -> bool:
        """Whether the folder does not say which VAE made its latents, and the one assumed makes others."""
        return self.origin is None and len(self) > 0 and self.manifest.channels != ASSUMED_CHANNELS

    def check_kind(self, index: int, row: np.ndarray) -> None:
        """`BadFile` where a record is not (mean, std), which all programs with this layout write."""
        if kind_of(row, self.where(index)) != STD:
            low = float(row[len(row) // 2 :].min())
            raise BadFile(
                f"{self.where(index)}: std {low:.3g}, which can't be negative (log-variance in place of std?)"
            )


def _count(folder: Path, suffixes: tuple[str, ...]) -> int:
    """How many files below a folder have such a suffix."""
    return sum(name.lower().endswith(suffixes) for *_, names in os.walk(folder) for name in names)


def repa_images(records: RepaSet) -> Source:
    """The images beside the latents, in the records' order. UserError where an image's number isn't its latent's."""
    folder = records.folder / IMAGES
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; REPA's layout has the images there, each beside its latent")
    files = [Path(parent, name).relative_to(folder) for parent, _, names in os.walk(folder) for name in names]
    images = sorted(path.as_posix() for path in files if path.name.lower().endswith(SUFFIXES))
    for image, latent in zip(images, records.names, strict=True):
        if re.sub(r"\D", "", image) != re.sub(r"\D", "", latent):
            raise UserError(f"{folder}: {shown(image)} stands where the image of {shown(latent)} should")
    labels, table = records.labels, folder / LABELS_FILE
    if table.is_file():
        by_name = read_labels(parse_labels_file(read_bytes(table), str(table)), str(table))
        labels = np.array([by_name.get(name, -1) for name in images], np.int64)
    classes = records.manifest.num_classes
    return Source(
        f"{folder.parent.name}/{IMAGES}", images, labels, classes, (), lambda i: read_bytes(folder / images[i])
    )
