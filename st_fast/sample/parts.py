"""A set of samples on its way: whole batches on the disk, each written at once, and the settings they were drawn with.

`<folder>/sample.json` holds the settings; `<folder>/parts/<batch>.safetensors` the images and labels of each batch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile, durable_file, fsync_path, make_folder, read_json, write_all, write_json_atomic
from st_fast.sample.files import Images, three_channels

FORMAT = "st_fast.samples/1"
SETTINGS = "sample.json"


@dataclass(frozen=True)
class Settings:
    """All that the images of a set follow from. Two sets with equal settings have equal images, on equal machines."""

    stage: str
    step: int
    weights: str
    model_sha256: str
    """Of the weights that drew."""
    vae: str
    path: str
    sampler: str
    steps: int
    cfg_scale: float
    cfg_range: tuple[float, float]
    labels: str
    num_classes: int
    seed: int
    num: int
    batch_size: int
    precision: str
    compiled: bool

    @property
    def batches(self) -> int:
        """How many batches hold the samples; the last is as large as the others, and what is too many is not used."""
        return -(-self.num // self.batch_size)


class Parts:
    """The batches of a set in its folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    def begin(self) -> None:
        """Writes the settings, or UserError if the folder holds samples drawn with others."""
        found = self.folder / SETTINGS
        if found.exists():
            check_same(found, self.settings)
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: holds other files and no {SETTINGS}; choose another --out")
        make_folder(self.folder / "parts")
        write_json_atomic(found, {"format": FORMAT} | asdict(self.settings))

    def _file(self, batch: int) -> Path:
        return self.folder / "parts" / f"{batch:06d}.safetensors"

    def missing(self) -> list[int]:
        """The batches that are still to be drawn."""
        return [batch for batch in range(self.settings.batches) if not self._file(batch).exists()]

    def put(self, batch: int, images: Tensor, labels: Tensor) -> None:
        """Keeps a batch: uint8 images (B, 1 or 3, H, W) and labels (B,); after a crash it is there or not there."""
        path = self._file(batch)
        make_folder(path.parent)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        with durable_file(partial) as descriptor:
            write_all(descriptor, save({"images": images.contiguous(), "labels": labels.contiguous()}))
        os.rename(partial, path)
        fsync_path(path.parent)

    def get(self, batch: int) -> tuple[Images, NDArray[np.int64]]:
        """Images (n, H, W, 3) and labels (n,) of a batch, without what is too many; `BadFile` if it is damaged."""
        size, path = self.settings.batch_size, self._file(batch)
        try:
            found = load(path.read_bytes())
            images, labels = found["images"], found["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise BadFile(f"{path}: damaged ({error}); remove it, and the same command draws it again") from None
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != size or labels.shape != (size,):
            raise BadFile(f"{path}: not a batch of {size} images; remove it, and the same command draws it again")
        count = min(size, self.settings.num - batch * size)
        return three_channels(images[:count].numpy()), labels[:count].numpy()

    def blocks(self) -> Iterator[Images]:
        """All images (n, H, W, 3), a batch at a time."""
        for batch in range(self.settings.batches):
            yield self.get(batch)[0]

    def all_labels(self) -> NDArray[np.int64]:
        """The labels (num,)."""
        return np.concatenate([self.get(batch)[1] for batch in range(self.settings.batches)])

    def drop(self) -> None:
        """Removes the batches, once a file holds them all."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder's samples were drawn with; `BadFile` if it holds none."""
    found = read_json(folder / SETTINGS)
    if found.get("format") != FORMAT:
        raise BadFile(f"{folder / SETTINGS}: format is {found.get('format')!r}; this program reads {FORMAT!r}")
    return found


def check_same(path: Path, settings: Settings) -> None:
    """UserError naming every setting in which the samples that are there differ from those asked for."""
    there = read_settings(path.parent)
    asked = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    differing = [f"{key} {there.get(key)} (now {value})" for key, value in asked.items() if there.get(key) != value]
    if differing:
        raise UserError(f"{path.parent}: holds samples drawn with {', '.join(differing)}; choose another --out")
