"""Latents → pictures: the decoder that belongs to a data folder, and PNG grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from st_fast.data.manifest import Manifest
from st_fast.model.vae import decode, load_vae

Decode = Callable[[Tensor], Tensor]
"""Scaled latents (B, C, S, S) → uint8 images (B, 1 or 3, H, W) on the CPU."""


def decoder(folder: Path, manifest: Manifest, device: torch.device) -> Decode:
    """The decoder of a data folder: its own VAE where it has one inside, else the one its manifest names."""
    vae = load_vae(folder / manifest.vae.path if manifest.vae.path else manifest.vae.name, device)
    return lambda latents: decode(vae, latents, manifest.scale)


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """uint8 (B, 1 or 3, H, W) → one uint8 picture (H', W', 1 or 3), row by row, on white."""
    batch, channels, height, width = images.shape
    rows = -(-batch // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet.permute(1, 2, 0)


def enlarged(picture: Tensor, smallest: int = 480) -> NDArray[np.uint8]:
    """A picture (H, W, 1 or 3) as an array, larger by a whole factor so that it is ≥ `smallest` wide."""
    factor = max(1, -(-smallest // picture.shape[1]))
    array = picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def save_png(picture: Tensor, path: Path, smallest: int = 480) -> None:
    """Writes a picture (H, W, 1 or 3) as PNG, enlarged by a whole factor until its width reaches `smallest` pixels."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(enlarged(picture, smallest)).save(path)
