"""Samples as files: ADM's `.npz`, written and read row by row so that memory stays flat, PNG folders and GIFs."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date in a zip's entries: that of no file, so that the same samples make the same bytes."""
FRAME_MS, LAST_FRAME_MS = 80, 2_000

Images = NDArray[np.uint8]
"""(n, H, W, 3)."""


def three_channels(images: Images) -> Images:
    """uint8 (n, 1 or 3, H, W) → (n, H, W, 3): grey three times."""
    last = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(last if last.shape[-1] == 3 else last.repeat(3, axis=-1))


def write_npz(path: Path, shape: tuple[int, int, int], blocks: Iterable[Images], labels: NDArray[np.int64]) -> None:
    """ADM's sample file: arr_0 uint8 (N, H, W, 3) and arr_1 the labels (N,), N as many as labels.

    `blocks` yields the images of shape (H, W, 3) a block at a time. The file appears under its name when it is whole.
    ValueError if the blocks hold more or fewer than N images.
    """
    partial, done = path.with_name(f"{path.name}.partial-{os.getpid()}"), 0
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    done += len(block)
                    file.write(np.ascontiguousarray(block).data)
            with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels, allow_pickle=False)
        if done != len(labels):
            raise ValueError(f"{path}: {done} images for {len(labels)} labels")
        with partial.open("rb+") as whole:
            os.fsync(whole.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class ImageFile:
    """The images of an ADM `.npz`, of which `blocks` holds a few at a time in memory."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None

    def blocks(self, size: int = 256) -> Iterator[Images]:
        """Up to `size` images (n, H, W, 3) at a time, in order; `BadFile` where the file ends early."""
        row = int(np.prod(self.shape))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _header(file)
                for first in range(0, self.count, size):
                    count = min(size, self.count - first)
                    data = file.read(count * row)
                    if len(data) != count * row:
                        raise BadFile(
                            f"{self.path}: arr_0 ends after {first + len(data) // row} of {self.count} images"
                        )
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.shape)
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise BadFile(f"{self.path}: damaged ({error})") from None


def open_npz(path: Path) -> ImageFile:
    """Looks at a file as `write_npz` and ADM's programs write it; `BadFile` in one line if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                raise BadFile(f"{path}: no arr_0 (the images) in it, only {', '.join(sorted(names))[:80] or 'nothing'}")
            with archive.open("arr_0.npy") as file:
                shape, dtype = _header(file)
            labels = _labels(archive) if "arr_1.npy" in names else None
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, struct.error) as error:
        raise BadFile(f"{path}: not a readable .npz ({str(error).splitlines()[0]})") from None
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or shape[0] == 0:
        raise BadFile(f"{path}: arr_0 is {dtype} of shape {shape}; uint8 (N, H, W, 3) is needed")
    if labels is not None and labels.shape != (shape[0],):
        raise BadFile(f"{path}: arr_1 has shape {labels.shape} for {shape[0]} images; one label an image is needed")
    return ImageFile(path, shape[0], (shape[1], shape[2], shape[3]), labels)


def _header(file: object) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)  # type: ignore[arg-type]
    if fortran:
        raise ValueError("arr_0 is in Fortran order")
    return shape, dtype


def _labels(archive: zipfile.ZipFile) -> NDArray[np.int64] | None:
    with archive.open("arr_1.npy") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)  # type: ignore[arg-type]
    return found.astype(np.int64) if np.issubdtype(found.dtype, np.integer) else None


def write_pngs(folder: Path, first: int, images: Images) -> None:
    """`folder/000123.png` for each image (n, H, W, 3) from number `first` on; those already there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=first):
        path = folder / f"{number:06d}.png"
        if not path.exists():
            partial = path.with_suffix(f".partial-{os.getpid()}")
            Image.fromarray(image).save(partial, "png")
            os.replace(partial, path)


def write_gif(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """An endless GIF of frames (H, W) or (H, W, 3), the last of which stays for a while. UserError without frames."""
    if not frames:
        raise UserError(f"{path}: no frames; a GIF needs at least one")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(frame) for frame in frames]
    times = [*[FRAME_MS] * (len(frames) - 1), LAST_FRAME_MS]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)
