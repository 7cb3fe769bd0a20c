"""From an image's pixels to what a frozen encoder sees: the published preprocessing of REPA (arXiv 2410.06940)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from st_fast.core.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """What pixels are normalised with: mean and standard deviation of RGB in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
AT_ONCE = 32
"""Images that are in float64 at the same time: a batch of 256 would take gigabytes."""


def preprocess(
    images: Tensor, side: int, dtype: torch.dtype = torch.float32, statistics: Statistics = IMAGENET
) -> Tensor:
    """uint8 (n, 1 or 3, S, S) → (n, 3, side, side): to [0, 1], normalised, then bicubic where S is another side.

    Bicubic (Keys' kernel, a = −0.75) without antialiasing, as the published code has it; whether pixels are normalised
    before or after makes no difference, since the kernel's weights add up to 1. Grey images become three channels.
    """
    return torch.cat([_preprocess(part, side, statistics).to(dtype) for part in images.split(AT_ONCE)])


def _preprocess(images: Tensor, side: int, statistics: Statistics) -> Tensor:
    # In float64: float32 would place the pixels of a large image by 1e-5 of a pixel wrongly.
    pixels = images.expand(-1, 3, -1, -1).double() / 255
    normal = [(pixels[:, c] - statistics.mean[c]) / statistics.std[c] for c in range(3)]  # numbers wait for no device
    pixels = torch.stack(normal, dim=1)
    if side != images.shape[-1]:
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
    return pixels


def input_side(size: int, patch: int) -> int:
    """Pixels a side that an encoder with patches of `patch` pixels sees of images of `size`.

    Patches of 14 (or 7): 224·(size/256), so that a patch covers as many pixels of the image as a token of a latent
    model with patch 2; patches of 16 cover that of the image as it is. So the released code has it for DINOv2, CLIP
    and I-JEPA (14) and for MAE (16).
    """
    if patch % 7:
        return size
    if size % 8:
        raise UserError(f"images of {size} pixels: an encoder sees 7/8 of them a side; a multiple of 8 is needed")
    return size * 7 // 8
