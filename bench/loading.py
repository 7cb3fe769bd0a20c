"""Samples a second of every loader, warm and cold, against the published per-file loader; and what a step waits.

The published loader (REPA's, which Self-Transcendence shares) opens one PNG and one .npy an image in worker processes
and never uses the PNG; it is written here plainly. Cold means that the page cache was told to forget the files.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.machine import OthersLoad, Suite, Task
from bench.measure import Effort, Row, Samples, Stopwatch, interleave, noise, spread
from st_fast.data.ahead import ReadAhead
from st_fast.data.loader import DaliLoader, Loader, ResidentLoader, dali_missing
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.data.shards import ShardSet, open_data
from st_fast.prepare.writing import write_shards

BATCH, BATCHES = 256, 24
FILES = 512
"""Records of the per-file layout: enough for its rate, few enough to write."""
STEP_SECONDS = 0.05
"""A step that takes 256 images in this time consumes 5,120 a second: seven times XL/2's goal on one H200."""
SHAPES = {"8×32×32": ((8, 32, 32), 16_384, 256), "8×64×64": ((8, 64, 64), 4_096, 512)}
"""Moments → (shape, records, pixels of the image they stand for)."""


class PerFile(Dataset[tuple[Tensor, Tensor, int]]):
    """One image and one latent a file, as published."""

    def __init__(self, folder: Path) -> None:
        self.images, self.latents = sorted(folder.glob("*.png")), sorted(folder.glob("*.npy"))

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        with Image.open(self.images[index]) as file:
            image = np.array(file).transpose(2, 0, 1)
        return torch.from_numpy(image), torch.from_numpy(np.load(self.latents[index])), 0


def write(folder: Path, shape: tuple[int, int, int], count: int, pixels: int) -> ShardSet:
    """Random records as shards and the same kind of records as files, in `folder`; the set of shards."""
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.rand(512, *shape, generator=draw), torch.zeros(512)) for _ in range(count // 512)]
    write_shards(folder / "shards", batches, Manifest(0, shape, "float16", 1.0, VaeInfo("none"), "random", 1), 4_096)
    (folder / "files").mkdir()
    noisy = np.random.default_rng(0).integers(0, 256, (pixels // 8, pixels // 8, 3), np.uint8)
    picture = folder / "picture.png"
    Image.fromarray(noisy).resize((pixels, pixels)).save(picture)
    for number in range(FILES):
        shutil.copyfile(picture, folder / "files" / f"{number:08d}.png")
        np.save(folder / "files" / f"{number:08d}.npy", batches[0][0][number % 512].numpy())
    os.sync()  # only clean pages can be dropped
    shards = open_data(folder / "shards", verify=False)
    assert isinstance(shards, ShardSet)
    return shards


def forget(folder: Path) -> None:
    """Drops a folder's files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def random_requests(count: int, number: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(number)
    return (rng.integers(0, count, BATCH) for _ in range(BATCHES))


def streaming(loader: Loader, records: ShardSet, device: torch.device, cold: bool) -> Callable[[int, Stopwatch], None]:
    """One round: BATCHES random batches, each brought to the host or device."""

    def run(number: int, watch: Stopwatch) -> None:
        if cold:
            forget(records.folder)
        with watch("read"):
            for moments, _ in loader.stream(random_requests(len(records), number)):
                moments.to(device, non_blocking=True)

    return run


def per_file(folder: Path, cold: bool) -> Callable[[int, Stopwatch], None]:
    """One round of the published loader: every file once, in workers that live on between rounds."""
    files = DataLoader(
        PerFile(folder), BATCH, shuffle=True, num_workers=os.cpu_count() or 1, persistent_workers=True, drop_last=True
    )

    def run(number: int, watch: Stopwatch) -> None:
        if cold:
            forget(folder)
        with watch("read"):
            for _ in files:
                pass

    return run


def waited(loader: Loader, records: ShardSet) -> float:
    """The share of time that a consumer which computes STEP_SECONDS on all cores a batch stands waiting."""
    matrix = torch.rand(512, 512)
    lost, start = 0.0, time.perf_counter()
    stream = iter(loader.stream(random_requests(len(records), 0)))
    for _ in range(BATCHES):
        before = time.perf_counter()
        next(stream)
        after = time.perf_counter()
        lost += after - before
        while time.perf_counter() - after < STEP_SECONDS:
            matrix @ matrix
    return lost / (time.perf_counter() - start)


@dataclass(frozen=True)
class Records:
    """One shape's records, in a folder that gets `shards/` and `files/` when the first row is wanted."""

    name: str
    folder: Path
    device: torch.device
    effort: Effort
    shape: tuple[int, int, int]
    count: int
    pixels: int
    _measured: dict[str, dict[str, Row]] = field(default_factory=dict)

    @functools.cached_property
    def shards(self) -> ShardSet:
        return write(self.folder, self.shape, self.count, self.pixels)

    def row(self, warmth: str, kind: str) -> Row:
        """One loader's row; all of that warmth are measured when the first one is asked for."""
        if warmth not in self._measured:
            self._measured[warmth] = self.rows(warmth)
        return self._measured[warmth][kind]

    def rows(self, warmth: str) -> dict[str, Row]:
        """Rates of all loaders, measured in turn, and how many times that of the published loader they are."""
        others, device = OthersLoad(), self.device
        with ExitStack() as opened:
            loaders: dict[str, Loader] = {"torch": ReadAhead(self.shards, pinned=device.type == "cuda")}
            if not dali_missing():
                loaders["dali"] = DaliLoader(self.shards, device)
            start = time.perf_counter()
            if warmth == "warm":  # cold it reads the disk once, before the first step
                loaders["resident"] = ResidentLoader(self.shards, device)
            load_seconds = time.perf_counter() - start
            for loader in loaders.values():
                opened.callback(loader.close)
            rows = rates(self._samples(loaders, warmth == "cold"))
            for kind, row in rows.items():
                if warmth == "warm" and kind in loaders:
                    row["waited"] = round(waited(loaders[kind], self.shards), 4)
                row |= {"shape": self.name, "cache": warmth, "loader": kind}
                if kind == "resident":
                    row["load seconds"] = round(load_seconds, 2)
        return {kind: row | {"load": round(others.read(), 2)} for kind, row in rows.items()}

    def _samples(self, loaders: dict[str, Loader], cold: bool) -> dict[str, Samples]:
        """Seconds of each round."""
        variants = {kind: streaming(loader, self.shards, self.device, cold) for kind, loader in loaders.items()}
        variants["per file"] = per_file(self.folder / "files", cold)
        return interleave(variants, self.device, self.effort)


def rates(samples: dict[str, Samples]) -> dict[str, Row]:
    """A row a loader, from the seconds of its rounds."""
    counts = {kind: FILES // BATCH * BATCH if kind == "per file" else BATCH * BATCHES for kind in samples}
    found = {kind: counts[kind] / statistics.median(seconds["read"]) for kind, seconds in samples.items()}
    return {
        kind: {
            "samples/s": round(rate),
            "noise": round(noise(samples[kind]["read"]), 3),
            "times per file": round(rate / found["per file"], 1),
            "spread_ms": spread(samples[kind]["read"]),
        }
        for kind, rate in found.items()
    }


def loaders(suite: Suite) -> Iterator[Task]:
    """Every loader at every shape, cold and warm; those of a shape and warmth are measured together."""
    effort = Effort(9, 30, least=5, warmup=1) if suite.full else Effort(5, 20, least=3, warmup=1)
    kinds = ("torch", *([] if dali_missing() else ["dali"]), "resident", "per file")
    for name, (shape, count, pixels) in [*SHAPES.items()][: 1 if suite.small else None]:
        with tempfile.TemporaryDirectory(prefix="st_fast-bench-") as made:
            records = Records(name, Path(made), suite.device, effort, shape, count, pixels)
            if suite.small:
                records = replace(records, count=1_024, effort=suite.effort)
            for warmth in ("cold", "warm"):
                for kind in kinds:
                    if (warmth, kind) != ("cold", "resident"):
                        yield f"{name} {warmth} {kind}", partial(records.row, warmth, kind)
