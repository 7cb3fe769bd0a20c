"""Small sets of latents and small pictures for the data tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_fast.data.manifest import Manifest, VaeInfo
from st_fast.prepare.writing import write_shards

torch.set_num_threads(1)

MakeSet = Callable[..., Path]


def random_moments(count: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """(count, 2C, H, W) float32 with positive std."""
    moments = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    moments[:, shape[0] // 2 :].abs_()
    return moments


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Writes a set of random latents and returns its folder."""

    def make(
        count: int = 50, shape: tuple[int, int, int] = (4, 3, 5), dtype: str = "float16", shard_size: int = 16
    ) -> Path:
        folder = tmp_path / "set"
        labels = torch.arange(count) % 7
        manifest = Manifest(0, shape, dtype, 0.5, VaeInfo("none"), "random", 7)
        write_shards(folder, [(random_moments(count, shape), labels)], manifest, shard_size)
        return folder

    return make


def picture(seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes with three pictures each; spaces and other scripts in the names."""
    root = tmp_path / "images"
    for number, name in enumerate(("été 中文", "b c")):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"picture {i} ü.png").write_bytes(encoded(picture(10 * number + i)))
    return root
