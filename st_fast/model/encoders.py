"""Frozen image encoders whose patch features supervise (REPA, arXiv 2410.06940).

`ImageEncoder` is all that the rest of the program knows of one; `load_encoder` gives the vision transformers that
`st_fast.model.vision` reads through transformers, and whatever else stands in `ENCODERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from st_fast.model import vision


class ImageEncoder(Protocol):
    """Turns images into a grid of patch features."""

    name: str
    """As the recipe and the folder of features name it: a hub name or a folder's."""
    hash: str
    """SHA-256 of the weights."""
    width: int
    """Channels of a feature."""

    def grid(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of images of size × size pixels; UserError where that can't be."""
        ...

    def flops(self, size: int) -> float:
        """FLOPs of one image's forward."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, 1 or 3, S, S) → (n, h, w, width) float32 on the encoder's device, without gradient."""
        ...


Load = Callable[[torch.device, torch.dtype], ImageEncoder]
ENCODERS: dict[str, Load] = {}
"""Encoders that are neither folders nor on the hub, by the name that recipes give them (docs/methods.md has one)."""


def load_encoder(name: str, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """A frozen encoder: one of `ENCODERS`, a local folder or a hub name. One line of UserError if it can't be had."""
    if name in ENCODERS:
        return ENCODERS[name](device, dtype)
    return vision.load(name, device, dtype)
