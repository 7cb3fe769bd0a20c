"""The InceptionV3 of FID: TensorFlow's 2015 network, with the parameter names of its published PyTorch weights.

Reads `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and `pt_inception-2015-12-05-6726825d.pth`
(pytorch-fid), or the same tensors as safetensors. The architecture is that of Szegedy et al., arXiv 1512.00567, as
the 2015 graph has it: averages inside the blocks leave the border's padding out, the last block pools by maximum,
and there are 1,008 classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from st_fast.core.errors import UserError
from st_fast.core.files import sha256_file
from st_fast.model.formats.importing import read_file

CLASSES, FEATURES, SIDE = 1_008, 2_048, 299
SPATIAL_CHANNELS = 7
"""Of the 1×1 branch of Mixed_6d, whose 17×17 maps are sFID's features (arXiv 2103.03841)."""
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""Under these names torch-fidelity and pytorch-fid keep the weights in torch.hub's folder."""
BATCH = 64

Layer = tuple[int, int | tuple[int, int]] | tuple[int, int | tuple[int, int], int]
"""(channels, kernel) or (channels, kernel, stride)."""
CROSS = (0, 0)
"""The kernel of a layer that is a 1×3 and a 3×1 convolution side by side."""
ROW, COLUMN = (1, 7), (7, 1)


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; "same" padding where none is given and the stride is 1."""

    def __init__(
        self, inside: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (sides[0] // 2, sides[1] // 2) if padding is None and stride == 1 else (padding or 0, padding or 0)
        self.conv = nn.Conv2d(inside, out, sides, stride, same, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: chains of convolutions over one input, concatenated.

    The layers of a chain are named `<chain>_1`, `<chain>_2`, …, a single one `<chain>`. `pool` is "average" or
    "maximum", which precedes the chain `branch_pool`, or "stride 2", a chain of its own.
    """

    def __init__(self, inside: int, pool: str, **chains: Sequence[Layer]) -> None:
        super().__init__()
        self.pool = pool
        self.chains: dict[str, list[tuple[str, ...]]] = {chain: [] for chain in chains}
        for chain, layers in chains.items():
            width = inside
            for number, (out, kernel, *stride) in enumerate(layers, start=1):
                name = f"{chain}_{number}" if len(layers) > 1 else chain
                kernels = {f"{name}a": (1, 3), f"{name}b": (3, 1)} if kernel == CROSS else {name: kernel}
                for key, own in kernels.items():
                    self.add_module(key, Convolution(width, out, own, *stride))
                self.chains[chain].append(tuple(kernels))
                width = out

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain, layers in self.chains.items():
            parts = [self._pooled(x) if chain == "branch_pool" else x]
            for names in layers:
                parts = [self.get_submodule(name)(parts[0]) for name in names]
            found += parts
        return torch.cat([*found, F.max_pool2d(x, 3, stride=2)] if self.pool == "stride 2" else found, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _block_35(inside: int, pooled: int) -> Mixed:
    return Mixed(
        inside, "average", branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)],
    )  # fmt: skip


def _block_17(mid: int) -> Mixed:
    return Mixed(
        768, "average", branch1x1=[(192, 1)], branch7x7=[(mid, 1), (mid, ROW), (192, COLUMN)],
        branch7x7dbl=[(mid, 1), (mid, COLUMN), (mid, ROW), (mid, COLUMN), (192, ROW)], branch_pool=[(192, 1)],
    )  # fmt: skip


def block_8(inside: int, pool: str) -> Mixed:
    return Mixed(
        inside, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, CROSS)],
        branch3x3dbl=[(448, 1), (384, 3), (384, CROSS)], branch_pool=[(192, 1)],
    )  # fmt: skip


class InceptionV3(nn.Module):
    """299×299 pixels in [−1, 1) → pooled features, sFID's features, and class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        self.Mixed_6a = Mixed(288, "stride 2", branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)])
        self.Mixed_6b, self.Mixed_6c = _block_17(128), _block_17(160)
        self.Mixed_6d, self.Mixed_6e = _block_17(160), _block_17(192)
        self.Mixed_7a = Mixed(
            768, "stride 2", branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)],
        )  # fmt: skip
        self.Mixed_7b, self.Mixed_7c = block_8(1280, "average"), block_8(FEATURES, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 299, 299) → (B, 2048), (B, 17·17·7) with channels last as TensorFlow has them, (B, 1008).

        The probabilities leave the last layer's bias out, as all programs for the Inception Score do.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
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


class Output(NamedTuple):
    """The network's outputs for n images: float32 (n, 2048), (n, 2023) and (n, 1008)."""

    pooled: NDArray[np.float32]
    spatial: NDArray[np.float32]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Inception:
    """The network with its weights' SHA-256."""

    model: InceptionV3
    sha256: str

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Output:
        """uint8 images (n, H, W, 3), n ≥ 1, of any size."""
        device, parts = self.model.fc.weight.device, []
        for part in torch.split(torch.from_numpy(images.copy()), BATCH):
            pixels = tensorflow_resize(part.to(device).permute(0, 3, 1, 2).float())
            parts.append([found.cpu() for found in self.model((pixels - 128) / 128)])
        pooled, spatial, probabilities = (torch.cat(found).numpy() for found in zip(*parts, strict=True))
        return Output(pooled, spatial, probabilities)


def find_weights(given: Path | None) -> Path | None:
    """The file given, or the one that torch-fidelity or pytorch-fid has left in torch.hub's folder; None without."""
    if given is not None:
        return given
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    return next((cache / name for name in FILES if (cache / name).is_file()), None)


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with the weights of a file, every key of it. UserError in one line if they don't fit.

    The published files are pickles; only plain tensors are taken out of them, and nothing is executed (`read_pickled`).
    """
    if not path.is_file():
        raise UserError(f"Inception weights {path}: no such file; pass {FILES[0]} of torch-fidelity's releases")
    model, found = InceptionV3(), read_file(path)
    try:
        model.load_state_dict(found.get("", found))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"Inception weights {path}: not the FID network's weights ({' '.join(str(error).split())[:160]})"
        ) from None
    return Inception(model.eval().requires_grad_(False).to(device), sha256_file(path))
