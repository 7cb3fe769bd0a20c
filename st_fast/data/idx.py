"""IDX files as MNIST and Fashion-MNIST have them (`train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`).

An IDX file is two zero bytes, the type (8: uint8), the number of dimensions, each as a big-endian uint32, and the
values. Packed ones can't be read at random, so that a split is read whole, and each image is handed on as a PGM file.
"""

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from st_fast.core.errors import UserError, first_line
from st_fast.core.files import CHUNK, BadFile, allowance, open_regular, printable, shown
from st_fast.data.source import Asked, Source

IMAGES = re.compile(r"(?P<split>.+)-images[-.]idx3-ubyte(\.gz)?")
LABELS = "{split}-labels{dot}idx1-ubyte{packed}"
ALSO = {"t10k": "test"}
"""What a split is called besides, as MNIST's authors named the 10,000 test images."""
UBYTE = 8


def idx_files(names: Sequence[str]) -> dict[str, str]:
    """The files of images among `names`, by folder and split ("raw/train"); unpacked ones come before packed ones."""
    found: dict[str, str] = {}
    for name in sorted(names):
        folder, slash, file = name.rpartition("/")
        if match := IMAGES.fullmatch(file):
            found.setdefault(f"{folder}{slash}{match['split']}", name)
    return found


def open_idx(path: Path, names: Sequence[str], asked: Asked) -> Source:
    """The images of one split of the IDX files `names` in the folder `path`, with their labels as class numbers.

    UserError lists the splits where one has to be chosen, `BadFile` names a file that is no sound IDX file.
    """
    where = f"source {str(path)!r}"
    if column := asked.image_column or asked.label_column:
        option = "--image-column" if asked.image_column else "--label-column"
        raise UserError(f"{option} {printable(column)}: {where}: IDX files have no columns; leave it out")
    split, file = _chosen(where, idx_files(names), asked.subset.strip("/"))
    images = read_idx(path / file, 3)
    if asked.unlabelled:
        labels = np.zeros(len(images), np.int64)
    else:
        beside = _labels_of(path, split, file)
        labels = read_idx(beside, 1).astype(np.int64)
        if len(labels) != len(images):
            raise BadFile(f"{beside}: {len(labels):,} labels, {path / file} has {len(images):,} images")
    start = b"P5 %d %d 255\n" % (images.shape[2], images.shape[1])
    return Source(
        f"{printable(path.name)}/{printable(split)} (IDX files)",
        [f"{split}/{number:06d}" for number in range(len(images))],
        labels,
        int(labels.max()) + 1,
        (),
        lambda number: start + images[number].tobytes(),
        lambda number: str(zlib.crc32(images[number])),
        own_numbers=True,
    )


def _chosen(where: str, files: dict[str, str], subset: str) -> tuple[str, str]:
    """The split and its file of images; `subset` is its name, its folder, or both, as in "raw/train"."""

    def called(split: str) -> set[str]:
        folder, _, name = split.rpartition("/")
        return {"", split, folder, name, ALSO.get(name, name)}

    chosen = [subset] if subset in files else [split for split in files if subset in called(split)]
    if len(chosen) == 1:
        return chosen[0], files[chosen[0]]
    told = ", ".join(printable(split) for split in list(chosen or files)[:8])
    if not chosen:
        raise UserError(f"{where}: no split {subset!r}; it holds {told}")
    best = next((split for split in chosen if split.endswith("train")), chosen[0])
    raise UserError(f"{where}: it holds {told}: choose one, --subset {printable(best)}")


def _labels_of(path: Path, split: str, file: str) -> Path:
    """The file of labels beside a file of images, packed or not; UserError where there is none."""
    dot = "." if "-images." in file else "-"
    missing = shown(LABELS.format(split=split, dot=dot, packed=""))
    for packed in ("", ".gz"):
        if (labels := path / LABELS.format(split=split, dot=dot, packed=packed)).is_file():
            return labels
    raise UserError(
        f"source {str(path)!r}: {shown(file)} has no {missing} beside it; --unlabelled takes the images as one class"
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with so many dimensions, packed by gzip or not.

    `BadFile` for anything else; what the header claims is compared with the file's size before memory is taken.
    """
    with open_regular(path) as raw:
        size = raw.seek(0, 2)
        raw.seek(0)
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            return _values(raw, path, dimensions, size)
        try:
            with gzip.GzipFile(fileobj=raw) as file:
                return _values(file, path, dimensions, allowance(size))  # type: ignore[arg-type]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BadFile(f"{path}: not a sound gzip file ({first_line(error)})") from None


def _values(file: BinaryIO, path: Path, dimensions: int, most: int) -> np.ndarray:
    """The values after a header that claims no more than `most` bytes in all."""
    header = file.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, UBYTE, dimensions)):
        raise BadFile(f"{path}: not an IDX file of bytes in {dimensions} dimensions: it begins with {header[:4].hex()}")
    shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
    claimed = math.prod(shape)
    if claimed == 0 or len(header) + claimed > most:
        raise BadFile(f"{path}: claims {'×'.join(map(str, shape))} bytes, {most - len(header):,} can be in it")
    values, done = np.empty(claimed, np.uint8), 0
    while done < claimed and (piece := file.read(min(CHUNK, claimed - done))):
        values[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    if done < claimed or file.read(1):
        there = f"{done:,}" if done < claimed else "more"
        raise BadFile(f"{path}: {claimed:,} values by its header, {there} are there")
    return values.reshape(shape)
