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

    def __init__(self, in_features: int, out_features: int, kernels: KernelTable, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.kernels = kernels

    @property
    def own_bias(self) -> Tensor | None:
        """The bias as the layer itself is called with."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = self.own_bias
        y: Tensor = F.linear(x, self.weight) if bias is None else self.kernels.linear(x, self.weight, bias)
        return y


class BlockLinear(Linear):
    """A linear layer of a block. The table may leave the gradient of its bias to the op that reads its output next,
    which is given `bias_left(layer)`: its backward pass has dy at hand."""

    @property
    def own_bias(self) -> Tensor | None:
        """Detached, if its gradient is left to the next op."""
        return self.bias if bias_left(self) is None else self.bias.detach()


def bias_left(layer: nn.Module) -> Tensor | None:
    """The bias, if its gradient is left to the next op; None: the layer sums it itself, or none is needed."""
    if isinstance(layer, BlockLinear) and layer.kernels.bias_gradients and torch.is_grad_enabled():
        return layer.bias if layer.bias is not None and layer.bias.requires_grad else None
    return None


class ScaleWeight(nn.Module):
    """The weight w (D,) of a norm, taken into the modulation's scale (…, D): h·w·(1 + scale) = h·(1 + scale').

    So a norm with a weight costs no more than one without. In float32, as a small scale beside 1 would be lost in less.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, scale: Tensor) -> Tensor:
        """scale' (…, D) float32."""
        return self.weight.float() * (1 + scale.float()) - 1


def norm_weight(config: Model) -> ScaleWeight | None:
    """A norm's weight, if the norms of the recipe's network have one."""
    return ScaleWeight(config.width) if config.norm == "rms_affine" else None


def weighed(weight: nn.Module | None, scale: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """A modulation's scale with a norm's weight, and its other vectors in the scale's dtype, as the ops want them."""
    return (scale, *others) if weight is None else (weight(scale), *(other.float() for other in others))


def adaln_options(config: Model) -> dict[str, str]:
    """What the adaLN ops are told of the norm; nothing of LayerNorm."""
    return {} if config.norm == "layer" else {"norm": "rms"}


def head_norm(config: Model) -> nn.LayerNorm | nn.RMSNorm | None:
    """The norm of queries, or of keys, within each head."""
    if not config.qk_norm:
        return None
    return (nn.RMSNorm if config.qk_norm == "rms" else nn.LayerNorm)(config.head, eps=1e-6)


def queries_keys_values(
    kernels: KernelTable, qkv: Tensor, q_norm: nn.Module | None, k_norm: nn.Module | None, rope: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """qkv (B, N, 3, H, d) → q, k, v (B, H, N, d): queries and keys normalised, then rotated by `rope` (1 or B, N, d).

    `bias` (3·D,), the projection's, gets its gradient here.
    """
    vectors: tuple[Tensor | None, ...]
    if isinstance(q_norm, nn.RMSNorm) and isinstance(k_norm, nn.RMSNorm):
        norm, eps, vectors = "rms", q_norm.eps, (q_norm.weight, None, k_norm.weight, None)
    elif isinstance(q_norm, nn.LayerNorm) and isinstance(k_norm, nn.LayerNorm):
        norm, eps, vectors = "layer", q_norm.eps, (q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias)
    elif rope is None:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    else:
        norm, eps, vectors = "none", 1e-6, (None,) * 4
    return cast(Any, kernels.qk_norm(qkv, *vectors, eps, qkv_bias=bias, norm=norm, rope=rope))


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

    @property
    def last(self) -> BlockLinear:
        """The layer that makes the output."""
        return self.fc2

    def forward(self, y: Tensor) -> Tensor:
        if self.whole and isinstance(self.fc1, Linear):  # which an fp8 layer is not: it multiplies for itself
            return cast(
                Tensor,
                self.kernels.gelu_mlp(y, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.own_bias),
            )
        return self.fc2(self.kernels.gelu_tanh(self.fc1(y), bias_left(self.fc1)))


class SquaredReLU(nn.Module):
    """Two linear layers with relu(h)² between (arXiv 2109.08668): (B, N, D) → (B, N, D). Plain PyTorch, for which
    `torch.compile` makes as few passes as an op of its own would."""

    def __init__(self, width: int, hidden: int, kernels: KernelTable) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, kernels)  # no op follows that could sum its bias's gradient
        self.fc2 = BlockLinear(hidden, width, kernels)

    @property
    def last(self) -> BlockLinear:
        """The layer that makes the output."""
        return self.fc2

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(y)).square())


class SwiGLU(nn.Module):
    """Two linear layers with silu(gate)·value between (arXiv 2002.05202): (B, N, D) → (B, N, D).

    `w12` makes gate and value, `hidden` channels each, in one product; parameters are named as in LightningDiT.
    """

    def __init__(self, width: int, hidden: int, kernels: KernelTable) -> None:
        super().__init__()
        self.kernels = kernels
        self.w12 = BlockLinear(width, 2 * hidden, kernels)
        self.w3 = BlockLinear(hidden, width, kernels)

    @property
    def last(self) -> BlockLinear:
        """The layer that makes the output."""
        return self.w3

    def forward(self, y: Tensor) -> Tensor:
        return self.w3(self.kernels.swiglu(self.w12(y), bias_left(self.w12)))


MLPS: dict[str, type[Mlp | SwiGLU | SquaredReLU]] = {"gelu": Mlp, "swiglu": SwiGLU, "relu2": SquaredReLU}
"""By `model.mlp`."""


def mlp(config: Model, kernels: KernelTable) -> Mlp | SwiGLU | SquaredReLU:
    """A block's MLP."""
    return MLPS[config.mlp](config.width, config.hidden, kernels)


class FinalLayer(nn.Module):
    """The last modulated normalisation's parameters and the projection to patches: (B, N, D) → (B, N, p·p·C)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.norm_final = norm_weight(config)
        self.linear = nn.Linear(config.width, config.patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

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


def rope_angles(head: int, grid: tuple[int, int], unit: float = 1.0) -> Tensor:
    """(1, N, head) float32: of each of a head's pairs of channels the angle's cosine, then of each its sine.

    Axial 2-D RoPE (arXiv 2104.09864; as LightningDiT and EVA-02 have it): the first half of the pairs turns by the row,
    the other by the column, at frequencies 10000^(−4k/head). Neighbours in the grid lie `unit` apart.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [(place.flatten().double() * unit)[:, None] * frequencies for place in (rows, columns)]  # (N, d/4) each
    pairs = torch.cat(angles, dim=1)  # (N, d/2)
    return torch.cat((pairs.cos(), pairs.sin()), dim=1).float()[None]


def fixed_positions(config: Model) -> nn.Parameter | None:
    """(1, N, D): the positions of an image's tokens, which are not trained, on the default device; None with RoPE
    alone."""
    if config.position == "rope":
        return None
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
