"""Latents with EDM's dataset.json beside them, in a folder or a zip: EDM2's img-mean-std-*.npy, SpeedrunDiT's vae-in/.

EDM2 and REPA write the same files of (mean, std) by Stable Diffusion's VAE. But EDM2 encodes images from 0 to 1, for
which the VAE was not trained, and whitens each channel with constants of its own (NVlabs/edm2, training/encoders.py);
REPA's copy of its tool encodes from -1 to 1. The means of the channels tell which it was: 5.81 or 0.86 in the first.
SpeedrunDiT's img-latents-*.npy (1, C, H, W) are drawn once by REPA-E's INVAE, the model's latent is 0.3099 times that.
"""

import hashlib
import io
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from st_fast.core.files import BadFile, open_regular, read_bytes, shown
from st_fast.core.limits import Zip, npy_header, read_npy
from st_fast.data.labels import LABELS_FILE, parse_labels_file, read_labels
from st_fast.data.layouts.records import (
    LATENT,
    SAMPLED,
    SD_SCALE,
    ForeignRecords,
    fill,
    floats_of,
    made_manifest,
)
from st_fast.data.manifest import VaeInfo

SPEEDRUN = "vae-in"
SD, SD_CHANNELS, SD_FACTOR = "sd-vae-ft-mse", 4, 8
INVAE, IN_CHANNELS, IN_FACTOR, IN_SCALE = "REPA-E/e2e-invae-hf", 32, 16, 0.3099
UNIT_MEAN, UNIT_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
"""What EDM2 takes off its latents, and divides them by: their statistics, of images from 0 to 1."""
SIGNED_MEAN = (0.865, -0.278, 0.216, 0.374)
"""The mean of Stable Diffusion's latents of ImageNet from -1 to 1."""
NAMED = re.compile(r"img-(mean-std|latents)-\d+\.npy")
LOOKED_AT = 8
"""Entries of a folder that are looked at to see whether it holds such files."""
FILE_BYTES = 2**26


def is_edm(path: Path, names: list[str]) -> bool:
    """Whether a folder or zip holds latents with a dataset.json; `BadFile` where that is missing."""
    if path.is_file():
        if path.suffix.lower() != ".zip":
            return False
        with Zip(path) as archive:
            inside = archive.NameToInfo
            return LABELS_FILE in inside and any(name.endswith(".npy") for name in inside)
    if (path / SPEEDRUN / LABELS_FILE).is_file():
        return True
    found = next((name for name in sorted(names)[:LOOKED_AT] if _latents(path / name)), None)
    if found is None:
        return False
    if not (path / LABELS_FILE).is_file():
        raise BadFile(
            f"{path}: latents as EDM2 and REPA write them in {shown(found)}, but no {LABELS_FILE} with labels"
        )
    if path.name == "vae-sd":
        raise BadFile(f"{path}: REPA's latents; name the folder above, {path.parent}")
    return True


def _latents(path: Path) -> bool:
    """Whether a file, or the first file of a folder of files, has a name that these tools give."""
    if path.is_dir():
        with os.scandir(path) as entries:
            return any(NAMED.fullmatch(entry.name) for entry in islice(entries, LOOKED_AT))
    return NAMED.fullmatch(path.name) is not None


class EdmSet(ForeignRecords):
    """The records by file name."""

    usual = f"EDM2's makes moments of {SD_CHANNELS}, SpeedrunDiT's latents of {IN_CHANNELS}"

    def __init__(self, path: Path, threads: int = 8) -> None:
        self.folder = path = Path(path)
        self._read: Callable[[str], bytes]
        if path.is_file():
            packed = ZipMembers(path)
            self._read, self._zip, top = packed.read, True, str(path)
            data, there = packed.read(LABELS_FILE), {name for name in packed.places if name.endswith(".npy")}
        else:
            root = path / SPEEDRUN if (path / SPEEDRUN / LABELS_FILE).is_file() else path
            self._read, self._zip, top = (lambda name: read_bytes(root / name, FILE_BYTES)), False, str(root)
            data, there = read_bytes(root / LABELS_FILE), _below(root)
        self._top = top
        document = parse_labels_file(data, f"{top}: {LABELS_FILE}")
        if document.get("labels", "") is None:
            raise BadFile(
                f'{top}: {LABELS_FILE}: "labels" is null; a class for each file is needed, 0 for all if need be'
            )
        table = read_labels(document, f"{top}: {LABELS_FILE}")
        if odd := sorted(there ^ table.keys()):
            lacks = "has no label" if odd[0] in there else "is missing"
            raise BadFile(f"{top}: {len(there)} latents, {len(table)} labels: {shown(odd[0])} {lacks}")
        self.names = sorted(table)
        if not self.names:
            raise BadFile(f"{top}: {LABELS_FILE} names no latents")
        self.labels = np.array([table[name] for name in self.names], np.int64)
        source = f"EDM's layout, {LABELS_FILE} with SHA-256 {hashlib.sha256(data).hexdigest()}"
        self.open_files(path.parent if self._zip else Path(top), threads)
        self._describe(source)

    def watched(self) -> list[str]:
        """The latents' files, or the zip."""
        return [self.folder.name] if self._zip else list(self.names)

    def where(self, index: int) -> str:
        """A record's file."""
        return f"{self._top}: {self.names[index]}" if self._zip else f"{self._top}/{self.names[index]}"

    def read_stored(self, index: int, row: np.ndarray) -> None:
        """Reads one record into row (*shape)."""
        where = self.where(index)
        try:
            data = self._read(self.names[index])
        except OSError as error:
            raise BadFile(f"{where}: can't be read ({error.strerror or error})") from None
        array = read_npy(io.BytesIO(data), len(data), where)
        fill(row, array[0] if array.ndim == 4 and len(array) == 1 else array, where)

    def _describe(self, source: str) -> None:
        """Kind, VAE and normalisation."""
        first = self.where(0)
        data = self._read(self.names[0])
        place = npy_header(io.BytesIO(data), first)
        drawn = Path(self.names[0]).name.startswith("img-latents-")
        shape = floats_of(place, len(data), first, "(C, H, W)" if drawn else "(2C, H, W)")
        channels = shape[0] if drawn else shape[0] // 2
        said = {
            "count": len(self.names), "shape": shape, "dtype": "float32", "scale": 1.0, "vae": VaeInfo(""),
            "source": source, "num_classes": int(self.labels.max()) + 1, "posterior": "mean" if drawn else "sample",
            "shift": 0.0,
        }  # fmt: skip
        self.manifest = made_manifest(first, **said)
        if drawn:
            self.kind = LATENT
            if channels == IN_CHANNELS:
                said |= {"scale": IN_SCALE, "vae": VaeInfo(INVAE, factor=IN_FACTOR)}
                self.scale_of = "project"
        else:
            self.settle_kind()
            if channels == SD_CHANNELS and self._unit():
                self.scale_of = "project"
                said |= {"vae": VaeInfo(SD, factor=SD_FACTOR, black=0.0)}
                said |= {"latents_mean": UNIT_MEAN, "latents_std": UNIT_STD}
            elif channels == SD_CHANNELS:
                said |= {"scale": SD_SCALE, "vae": VaeInfo(SD, factor=SD_FACTOR)}
        self.manifest = made_manifest(first, **said)

    def _unit(self) -> bool:
        """Whether the VAE saw images from 0 to 1, by the means of some files; `BadFile` where these say neither."""
        row = np.empty(self.manifest.shape, np.float32)
        found = []
        for index in np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(int)).tolist():
            self.read_stored(index, row)
            found.append(row[:SD_CHANNELS].mean((1, 2), dtype=np.float64))
        mean = np.mean(found, 0)
        unit, signed = (float(np.linalg.norm(mean - of)) for of in (UNIT_MEAN, SIGNED_MEAN))
        if min(unit, signed) * 2 > max(unit, signed):
            raise BadFile(
                f"{self.folder}: channels' means {np.round(mean, 2).tolist()}, neither those of images from 0 to 1, as "
                f"EDM2 encodes them ({list(UNIT_MEAN)}), nor of -1 to 1 ({list(SIGNED_MEAN)}); in a folder named "
                "vae-sd they are taken for REPA's, of -1 to 1"
            )
        return unit < signed


class ZipMembers:
    """The files of a zip, read by many threads from one list of a million places."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._archive = Zip(path)
        self.places = {info.filename.replace("\\", "/"): info for info in self._archive.infolist()}

    def read(self, name: str) -> bytes:
        """The content of a file; `BadFile` where it is damaged. Stored ones, as EDM's tool writes, don't wait."""
        info, where = self.places[name], f"{self.path}: {shown(name)}"
        if info.compress_type != zipfile.ZIP_STORED:
            with self._lock:
                return self._archive.member(info, None if name == LABELS_FILE else FILE_BYTES)
        self._archive.check(info)
        with open_regular(self.path) as file:
            head = os.pread(file.fileno(), 30, info.header_offset)
            sizes = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            data = os.pread(file.fileno(), info.file_size, info.header_offset + 30 + sizes)
        if not head.startswith(b"PK\3\4") or len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise BadFile(f"{where} is damaged (its CRC-32 differs)")
        return data


def _below(root: Path) -> set[str]:
    """The names of all .npy files below a folder."""
    found = set[str]()
    for folder, _, names in os.walk(root):
        start = os.path.relpath(folder, root)
        prefix = "" if start == "." else f"{start}/"
        found |= {prefix + name for name in names if name.endswith(".npy")}
    return found
