"""Samples a second of every loader, warm and cold, against the published per-file loader; and what a step waits.

    pytest bench/bench_loader.py

The published loader (REPA's, which Self-Transcendence shares) opens one PNG and one .npy an image in worker processes
and never uses the PNG; it is written here plainly. Cold means that the page cache was told to forget the files.
Rows go to bench/results/<device>.json under "loader".
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.machine import Row, Store
from bench.measure import Effort, Samples, Stopwatch, interleave, noise
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

Case = tuple[str, ShardSet, Path]
"""Name, the set, and the folder that holds `shards/` and `files/`."""


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


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A set of shards and the same kind of records as files."""
    shape, count, size = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("loader")
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.rand(512, *shape, generator=draw), torch.zeros(512)) for _ in range(count // 512)]
    write_shards(folder / "shards", batches, Manifest(0, shape, "float16", 1.0, VaeInfo("none"), "random", 1), 4_096)
    (folder / "files").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size // 8, size // 8, 3), np.uint8))
    picture = picture.resize((size, size))
    for number in range(FILES):
        picture.save(folder / "files" / f"{number:08d}.png")
        np.save(folder / "files" / f"{number:08d}.npy", batches[0][0][number % 512].numpy())
    os.sync()  # only clean pages can be dropped
    return request.param, open_data(folder / "shards", verify=False), folder


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


def measure(case: Case, loaders: dict[str, Loader], device: torch.device, cold: bool) -> dict[str, Samples]:
    """Seconds of each round, all loaders in turn."""
    _, records, folder = case
    variants = {kind: streaming(loader, records, device, cold) for kind, loader in loaders.items()}
    variants["per file"] = per_file(folder / "files", cold)
    if cold:
        del variants["resident"]  # it reads the disk once, before the first step
    return interleave(variants, device, Effort(rounds=9, seconds=30, least=5, warmup=1))


def rows_of(samples: dict[str, Samples]) -> dict[str, Row]:
    """Rates, and how many times that of the published loader they are."""
    counts = {kind: FILES // BATCH * BATCH if kind == "per file" else BATCH * BATCHES for kind in samples}
    rates = {kind: counts[kind] / statistics.median(seconds["read"]) for kind, seconds in samples.items()}
    return {
        kind: {
            "samples/s": round(rate),
            "noise": round(noise(samples[kind]["read"]), 3),
            "times per file": round(rate / rates["per file"], 1),
        }
        for kind, rate in rates.items()
    }


def bench_loaders(case: Case, store: Store, device: torch.device, report: Callable[[Sequence[float]], None]) -> None:
    name, records, _ = case
    loaders: dict[str, Loader] = {"torch": ReadAhead(records, pinned=device.type == "cuda")}
    if not dali_missing():
        loaders["dali"] = DaliLoader(records, device)
    start = time.perf_counter()
    loaders["resident"] = ResidentLoader(records, device)
    load_seconds = time.perf_counter() - start
    for warmth in ("cold", "warm"):
        samples = measure(case, loaders, device, warmth == "cold")
        for kind, row in rows_of(samples).items():
            if warmth == "warm" and kind in loaders:
                row["waited"] = round(waited(loaders[kind], records), 4)
            row |= {"shape": name, "cache": warmth, "loader": kind}
            if kind == "resident":
                row["load seconds"] = round(load_seconds, 2)
            store.put("loader", f"{name} {warmth} {kind}", row)
    for loader in loaders.values():
        loader.close()
    report(samples["torch"]["read"])
