"""The layers that the networks share: linear layers, patches, times, positions, the MLP and the final projection.

Shapes: B samples, C latent channels, H and W a latent's height and width, p patch, D width; a grid of
h = H/p rows and w = W/p columns has N = h·w tokens, row by row.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.recipe.architecture import TIME_FREQUENCIES, Model

Run = Callable[..., Any]
"""Calls a module, its first argument, with the others: as it is, compiled, or computed again in the backward pass."""


def run_module(module: Callable[..., Any], *inputs: Any) -> Any:
    """The module as it is."""
    return module(*inputs)


class Linear(nn.Linear):
    """y = x·Wᵀ + b by the table's `linear`: (…, in) → (…, out). Initialised and saved like nn.Linear."""

    def __init__(self, in_features: int, out_features: int, kernels: KernelTable) -> None:
        super().__init__(in_features, out_features)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernels.linear(x, self.weight, self.bias)
        return y


class BlockLinear(Linear):
    """A linear layer of a block. The table may leave the gradient of its bias to the op that reads its output next,
    which is given `bias_left(layer)`: its backward pass has dy at hand."""

    @property
    def own_bias(self) -> Tensor:
        """The bias as the layer itself is called with: detached, if its gradient is left to the next op."""
        return self.bias if bias_left(self) is None else self.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernels.linear(x, self.weight, self.own_bias)
        return y


def bias_left(layer: nn.Module) -> Tensor | None:
    """The bias, if its gradient is left to the next op; None: the layer sums it itself, or none is needed."""
    if isinstance(layer, BlockLinear) and layer.kernels.bias_gradients and torch.is_grad_enabled():
        return layer.bias if layer.bias.requires_grad else None
    return None


class PatchEmbed(nn.Module):
    """Cuts a latent into p×p patches and projects each to a token: (B, C, H, W) → (B, N, D)."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is a matrix product of the unfolded patches.
        batch, channels, height, width = x.shape
        patch, rows, columns = self.patch, height // self.patch, width // self.patch
        grid = x.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        patches = grid.reshape(batch, rows * columns, channels * patch * patch)  # (B, N, C·p·p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """t (…) in [0, 1] → (…, D): sinusoids, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear layers."""
        return cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000) / half))
        angles = t.float()[..., None] * frequencies  # (…, 128)
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(sinusoids.to(self.layers[0].weight.dtype))


class Mlp(nn.Module):
    """Two linear layers with GELU (tanh form) between: (B, N, D) → (B, N, D)."""

    def __init__(self, width: int, hidden: int, kernels: KernelTable) -> None:
        super().__init__()
        self.kernels, self.whole = kernels, kernels.fuses("gelu_mlp")
        self.fc1 = BlockLinear(width, hidden, kernels)
        self.fc2 = BlockLinear(hidden, width, kernels)

    def forward(self, y: Tensor) -> Tensor:
        if self.whole and isinstance(self.fc1, Linear):  # which an fp8 layer is not: it multiplies for itself
            return cast(
                Tensor,
                self.kernels.gelu_mlp(y, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.own_bias),
            )
        return self.fc2(self.kernels.gelu_tanh(self.fc1(y), bias_left(self.fc1)))


class FinalLayer(nn.Module):
    """The last modulated normalisation's parameters and the projection to patches: (B, N, D) → (B, N, p·p·C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(y)


def sincos_positions(width: int, grid: tuple[int, int], unit: float = 1.0) -> Tensor:
    """(1, N, width): fixed 2-D sin-cos positions of DiT: half of the channels for the column, half for the row.

    Neighbours in the grid (h, w) lie `unit` apart.
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")

    def embed(position: Tensor) -> Tensor:
        angles = (position.flatten().double() * unit)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    return torch.cat((embed(columns), embed(rows)), dim=1).float()[None]


def fixed_positions(config: Model) -> nn.Parameter:
    """(1, N, D): the positions of an image's tokens, which are not trained, on the default device."""
    with torch.device("cpu"):  # for weights without memory PyTorch would import a compiler to count up
        positions = sincos_positions(config.width, config.grid)
    return nn.Parameter(positions.to(torch.get_default_device()), requires_grad=False)


def unpatchify(patches: Tensor, patch: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, p·p·C) of a grid (h, w), channels last within a patch, → (B, C, H, W)."""
    batch, (rows, columns) = len(patches), grid
    cut = patches.view(batch, rows, columns, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch, columns * patch)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, N, p·p·C), channels last within a patch: what `unpatchify` undoes."""
    batch, channels, height, width = latents.shape
    cut = latents.view(batch, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return cut.flatten(3).flatten(1, 2)
