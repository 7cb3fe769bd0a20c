"""Tiny DINOv2 folders and a tiny set with features, for the tests of REPA. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.data.ahead import RecordSet
from st_fast.data.shards import open_data
from st_fast.model.encoders import load_encoder
from st_fast.prepare.features import ImageLayout, write_features
from tests import tiny

SIZE = 16
"""Pixels of the images: 14 after the preprocessing, 2 × 2 patches of 7, as many as the tiny model has tokens."""
COUNT = 30


def write_encoder(folder: Path, registers: int = 0, patch: int = 7, width: int = 24, seed: int = 0) -> Path:
    """An untrained DINOv2, with registers if there are any."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=2, image_size=14, patch_size=patch)
    torch.manual_seed(seed)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def images(count: int = COUNT, size: int = SIZE) -> torch.Tensor:
    """uint8 (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


class Pictures:
    """These images, one a record, for `ReadAhead`."""

    def __init__(self, pixels: torch.Tensor, records: RecordSet) -> None:
        self.pixels, self.labels, self.manifest = pixels.numpy(), records.labels, ImageLayout(pixels.shape[1:])

    def read_into(self, indices: np.ndarray, out: np.ndarray) -> None:
        out[:] = self.pixels[indices]


def write_set(folder: Path, *encoders: Path) -> Path:
    """The tiny set with features of these encoders."""
    tiny.write_data(folder, COUNT)
    for path in encoders:
        encoder = load_encoder(str(path), torch.device("cpu"), torch.float32)
        records = open_data(folder, verify=False)
        write_features(folder, records, encoder, Pictures(images(), records))
        records.close()
    return folder
