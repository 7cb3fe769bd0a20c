"""The InceptionV3 of FID: TensorFlow's 2015 network, with the parameter names of its published PyTorch weights.

Reads `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and `pt_inception-2015-12-05-6726825d.pth`
(pytorch-fid), or the same tensors as safetensors. The architecture is that of Szegedy et al., arXiv 1512.00567, as
the 2015 graph has it: averages inside the blocks leave the border's padding out, the last block pools by maximum,
and there are 1,008 classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from st_fast.core.errors import UserError
from st_fast.core.files import sha256_file

CLASSES, FEATURES, SIDE = 1_008, 2_048, 299
SPATIAL_CHANNELS = 7
"""Of the 1×1 branch of Mixed_6d, whose 17×17 maps are sFID's features (arXiv 2103.03841)."""
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""Under these names torch-fidelity and pytorch-fid keep the weights in torch.hub's folder."""
BATCH = 64


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, inside: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35×35."""

    def __init__(self, inside: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inside, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Convolution(inside, 48, 1), Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inside, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inside, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        parts = (self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x)))
        return torch.cat(parts, dim=1)


class BlockB(nn.Module):
    """35×35 → 17×17."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inside, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inside, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), dim=1)


class BlockC(nn.Module):
    """17×17, with 7×7 convolutions as rows and columns."""

    def __init__(self, inside: int, mid: int) -> None:
        super().__init__()
        row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = Convolution(inside, 192, 1)
        self.branch7x7_1 = Convolution(inside, mid, 1)
        self.branch7x7_2 = Convolution(mid, mid, row[0], padding=row[1])
        self.branch7x7_3 = Convolution(mid, 192, column[0], padding=column[1])
        self.branch7x7dbl_1 = Convolution(inside, mid, 1)
        self.branch7x7dbl_2 = Convolution(mid, mid, column[0], padding=column[1])
        self.branch7x7dbl_3 = Convolution(mid, mid, row[0], padding=row[1])
        self.branch7x7dbl_4 = Convolution(mid, mid, column[0], padding=column[1])
        self.branch7x7dbl_5 = Convolution(mid, 192, row[0], padding=row[1])
        self.branch_pool = Convolution(inside, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((self.branch1x1(x), single, double, self.branch_pool(_average(x))), dim=1)


class BlockD(nn.Module):
    """17×17 → 8×8."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Convolution(inside, 192, 1), Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(inside, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat((self.branch3x3_2(self.branch3x3_1(x)), deep, F.max_pool2d(x, 3, stride=2)), dim=1)


class BlockE(nn.Module):
    """8×8; the last of the two pools by maximum."""

    def __init__(self, inside: int, by_maximum: bool) -> None:
        super().__init__()
        self.by_maximum = by_maximum
        self.branch1x1 = Convolution(inside, 320, 1)
        self.branch3x3_1 = Convolution(inside, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inside, 448, 1), Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(inside, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.by_maximum else _average(x)
        parts = (
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double), self.branch_pool(pooled),
        )  # fmt: skip
        return torch.cat(parts, dim=1)


class InceptionV3(nn.Module):
    """299×299 pixels in [−1, 1) → pooled features, sFID's features, and class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, by_maximum=False), BlockE(FEATURES, by_maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 299, 299) → (B, 2048), (B, 17·17·7) with channels last as TensorFlow has them, (B, 1008).

        The probabilities leave the last layer's bias out, as all programs for the Inception Score do.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, F.linear(pooled, self.fc.weight).softmax(dim=1)


def tensorflow_resize(images: Tensor, side: int = SIDE) -> Tensor:
    """float (B, C, H, W) → (B, C, side, side), bilinear as TensorFlow 1 did it: output pixel i lies at i·H/side.

    Other programs' pixel centres are half a pixel off, which moves FID by tenths.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = place.long().clamp_max(size - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = side
        share = (place - low).view(shape)
        below = images.index_select(dim, low)
        images = below + share * (images.index_select(dim, (low + 1).clamp_max(size - 1)) - below)
    return images


class Found(NamedTuple):
    """What the network says about images: float32 (n, 2048), (n, 2023) and (n, 1008)."""

    pooled: NDArray[np.float32]
    spatial: NDArray[np.float32]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Inception:
    """The network with its weights' SHA-256."""

    model: InceptionV3
    sha256: str

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Found:
        """uint8 images (n, H, W, 3), n ≥ 1, of any size."""
        device, parts = self.model.fc.weight.device, []
        for part in torch.split(torch.from_numpy(images.copy()), BATCH):
            pixels = tensorflow_resize(part.to(device).permute(0, 3, 1, 2).float())
            parts.append([found.cpu() for found in self.model((pixels - 128) / 128)])
        pooled, spatial, probabilities = (torch.cat(found).numpy() for found in zip(*parts, strict=True))
        return Found(pooled, spatial, probabilities)


def find_weights(given: Path | None) -> Path | None:
    """The file given, or the one that torch-fidelity or pytorch-fid has left in torch.hub's folder; None without."""
    if given is not None:
        return given
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    return next((cache / name for name in FILES if (cache / name).is_file()), None)


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with the weights of a file, every key of it. UserError in one line if they don't fit.

    The published files are pickles; only plain tensors are taken out of them (torch's restricted unpickler).
    """
    if not path.is_file():
        raise UserError(f"Inception weights {path}: no such file; pass {FILES[0]} of torch-fidelity's releases")
    model = InceptionV3()
    try:
        model.load_state_dict(_tensors(path))
    except (RuntimeError, SafetensorError, TypeError, AttributeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"Inception weights {path}: not the FID network's weights ({_brief(error)})") from None
    except Exception as error:  # the restricted unpickler's own error class is private
        raise UserError(f"Inception weights {path}: can't be read ({type(error).__name__})") from None
    return Inception(model.eval().requires_grad_(False).to(device), sha256_file(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__)[:160]
