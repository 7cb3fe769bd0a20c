"""Latents of three shapes, and a recipe for them, so small that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path

import torch

from st_fast.data.buckets import write_index
from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.prepare.writing import write_shards
from tests.tiny import RECIPE as SQUARES

SIDES = {"96x96": (12, 12), "80x112": (10, 14), "144x64": (18, 8)}
"""Of the latents, by bucket: 36, 35 and 36 tokens."""
COUNTS = {"96x96": 21, "80x112": 13, "144x64": 10}
BATCH = 4
RECIPE = (
    SQUARES.replace("latent_size = 4", "latent_size = 12")
    .replace("batch_size = 8", f"batch_size = {BATCH}")
    .replace("depth = 3", "depth = 2", 1)
)


def write_bucket(folder: Path, name: str, channels: int = 4, scale: float = 0.75, count: int = 0) -> None:
    """Random latents of one shape, of five classes; number i of them has all of its labels and values from i."""
    count, number = count or COUNTS[name], list(SIDES).index(name)
    generator = torch.Generator().manual_seed(number)
    moments = torch.randn(count, 2 * channels, *SIDES[name], generator=generator)
    moments[:, channels:] = moments[:, channels:].abs() * 0.1
    manifest = Manifest(0, (2 * channels, *SIDES[name]), "float16", scale, VaeInfo("none"), f"random {name}", 5)
    write_shards(folder / name, [(moments.half(), torch.arange(count) % 5)], manifest, shard_size=8)


def write_data(folder: Path, *names: str) -> Path:
    """The buckets of these names, all of them without one, and their index."""
    for name in names or SIDES:
        write_bucket(folder, name)
    write_index(folder, names or list(SIDES))
    return folder


def write_recipe(path: Path, data: Path, out: Path) -> Path:
    """The recipe above for these folders."""
    path.write_text(RECIPE.format(data=data, out=out))
    return path


def write_bucket_of_squares(folder: Path) -> Path:
    """The square latents alone, of an even number of patches each way; the data folder."""
    write_bucket(folder, "96x96")
    return folder / "96x96"
