"""Frozen image encoders whose patch features supervise (REPA, arXiv 2410.06940), with the published preprocessing.

`ImageEncoder` is all that the rest of the program knows of one; `load_encoder` gives DINOv2 through transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from st_fast.errors import UserError
from st_fast.vae import vae_hash

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in [0, 1]."""

FAMILIES = ("dinov2", "dinov2_with_registers")
"""What transformers calls the architectures that are read."""


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
        """uint8 (n, 1 or 3, S, S) → (n, h, w, width) float32 on the encoder's device."""
        ...


def preprocess(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (n, 1 or 3, S, S) → (n, 3, s, s) with s = 224·(S/256): to [0, 1], ImageNet's mean and std, then bicubic.

    The order, and bicubic without antialiasing, are those of the published code. Grey images become three channels.
    """
    # In float64: float32 would place the pixels of a large image by 1e-5 of a pixel wrongly.
    pixels = images.expand(-1, 3, -1, -1).double() / 255
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    side = input_side(images.shape[-1])
    return F.interpolate((pixels - mean) / std, (side, side), mode="bicubic", align_corners=False).to(dtype)


def input_side(size: int) -> int:
    """Pixels a side that an encoder sees of images of `size` pixels: 224·(size/256)."""
    if size % 8:
        raise UserError(f"images of {size} pixels: an encoder sees 7/8 of them a side; a multiple of 8 is needed")
    return size * 7 // 8


class Dinov2:
    """DINOv2 with or without registers: the patch tokens after the last LayerNorm; CLS and registers are dropped."""

    def __init__(self, name: str, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.hash = name, vae_hash(model)
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        config = model.config
        self.width, self.patch = int(config.hidden_size), int(config.patch_size)
        self.extra = 1 + int(getattr(config, "num_register_tokens", 0))
        """Tokens before the patches'."""

    def grid(self, size: int) -> tuple[int, int]:
        """(h, w) of the features of images of size × size pixels; UserError where patches don't divide the input."""
        side = input_side(size)
        if side % self.patch:
            raise UserError(
                f"encoder {self.name}: images of {size} pixels become {side}, no multiple of its patch {self.patch}"
            )
        return side // self.patch, side // self.patch

    def flops(self, size: int) -> float:
        """FLOPs of one image's forward: linear layers, attention, patch embedding."""
        config, d = self.model.config, self.width
        patches = self.grid(size)[0] ** 2
        n, hidden = patches + self.extra, int(d * config.mlp_ratio)
        # SwiGLU has three matrices of two thirds of the hidden width: about what two of all of it cost.
        block = n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d
        return 2.0 * (config.num_hidden_layers * block + patches * d * 3 * self.patch**2)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (n, 1 or 3, S, S) → (n, h, w, width) float32 on the encoder's device."""
        grid = self.grid(images.shape[-1])
        pixels = preprocess(images.to(self.model.device), self.model.dtype)
        tokens: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, self.extra :]
        return tokens.float().unflatten(1, grid)


def quiet_transformers(wanted: str) -> Any:
    """The transformers package without its progress bars; UserError, naming what is wanted of it, if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"encoder {wanted!r}: transformers can't be imported ({error}): pip install st_fast[repa]"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_encoder(name: str, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """A frozen DINOv2 from a local folder or a hub name; never unpickles. One line of UserError if it can't be had."""
    transformers = quiet_transformers(name)
    try:
        family = transformers.AutoConfig.from_pretrained(name).model_type
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True) if family in FAMILIES else None
    except Exception as error:  # transformers and the hub raise a dozen kinds; all mean that it can't be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"encoder {name!r}: neither a folder with a DINOv2 in safetensors, nor a hub name that can be reached, "
            f"such as facebook/dinov2-base ({reason[:200]})"
        ) from None
    if model is None:
        raise UserError(f"encoder {name!r}: its model_type is {family!r}; allowed: {', '.join(FAMILIES)}")
    return Dinov2(Path(name).resolve().name if Path(name).is_dir() else name, model.float(), device, dtype)
