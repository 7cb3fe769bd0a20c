"""SiT: the diffusion transformer (arXiv 2401.08740; blocks of DiT, arXiv 2212.09748), with the published key names.

Shapes: B samples, C latent channels, S latent side, p patch, N = (S/p)² tokens, D width, H heads, d = D/H.

The residual stream x and the modulated input y of the next sub-layer travel together, so that each `x + gate·a`
and the normalisation after it are one op: also across blocks, where the next block's shift and scale are used.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from st_fast.kernels import KernelTable
from st_fast.model.attention import BACKENDS, Attend, attend_packed
from st_fast.model.load import Pretrained
from st_fast.model.side_stream import Branches, batched
from st_fast.recipe.architecture import TIME_FREQUENCIES
from st_fast.recipe.schema import Model

Run = Callable[..., Any]
"""Calls a module, its first argument, with the others: as it is, compiled, or computed again in the backward pass."""


def run_module(module: nn.Module, *inputs: Tensor) -> Any:
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
    """Cuts a latent into p×p patches and projects each to a token: (B, C, S, S) → (B, N, D)."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is a matrix product of the unfolded patches.
        batch, channels, size, _ = x.shape
        side, patch = size // self.patch, self.patch
        grid = x.view(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        patches = grid.reshape(batch, side * side, channels * patch * patch)  # (B, N, C·p·p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] → (B, D): sinusoids, then an MLP."""

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
        angles = t.float()[:, None] * frequencies  # (B, 128)
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(sinusoids.to(self.layers[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) → (B, D). The last row is the null label's, there if class dropout trains it."""

    def __init__(self, num_classes: int, width: int, with_null: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + with_null, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention, with LayerNorm on queries and keys if `qk_norm`: (B, N, D) → (B, N, D)."""

    def __init__(self, width: int, heads: int, qk_norm: bool, kernels: KernelTable, attend: Attend) -> None:
        super().__init__()
        self.heads, self.kernels, self.attend = heads, kernels, attend
        self.qkv = (BlockLinear if qk_norm else Linear)(width, 3 * width, kernels)
        self.proj = BlockLinear(width, width, kernels)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else None
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else None

    def forward(self, y: Tensor) -> Tensor:
        qkv = self.qkv(y).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, d)
        if self.q_norm is None or self.k_norm is None:
            return self.proj(attend_packed(self.attend, qkv).flatten(2))
        q, k, v = self.kernels.qk_norm(
            qkv, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias, self.q_norm.eps,
            qkv_bias=bias_left(self.qkv),
        )  # (B, H, N, d) each, laid out for the attention  # fmt: skip
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


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


class Block(nn.Module):
    """A transformer block with adaLN-Zero: takes and returns the residual stream and the next modulated input."""

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend) -> None:
        super().__init__()
        self.kernels = kernels
        self.attn = Attention(config.width, config.heads, config.qk_norm, kernels, attend)
        self.mlp = Mlp(config.width, config.hidden, kernels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.run_attention = run_module

    def forward(
        self, x: Tensor, y: Tensor, modulation: Tensor, next_shift: Tensor, next_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, y (B, N, D); modulation (B, 6D) → the block's output and y of the next block, both (B, N, D)."""
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # (B, D) each
        fused = self.kernels.gate_residual_norm_modulate
        attended = self.run_attention(self.attn, y)
        x, y = fused(x, attended, gate_attn, shift_mlp, scale_mlp, a_bias=bias_left(self.attn.proj))
        return fused(x, self.mlp(y), gate_mlp, next_shift, next_scale, a_bias=bias_left(self.mlp.fc2))


class FinalLayer(nn.Module):
    """The last modulated normalisation's parameters and the projection to patches: (B, N, D) → (B, N, p·p·C)."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(y)


def sincos_positions(width: int, side: int) -> Tensor:
    """(1, side², width): fixed 2-D sin-cos positions of DiT: half of the channels for the column, half for the row."""
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

    def embed(position: Tensor) -> Tensor:
        angles = position.flatten().double()[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    return torch.cat((embed(columns), embed(rows)), dim=1).float()[None]


class SiT(Pretrained):
    """The velocity model v̂(x_t, t, y). `config` must be resolved (depth, width, heads, patch > 0)."""

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend = BACKENDS["sdpa"].attend) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width, with_null=config.class_dropout > 0)
        with torch.device("cpu"):  # for weights without memory PyTorch would import a compiler to count up
            positions = sincos_positions(config.width, config.latent_size // config.patch)
        self.pos_embed = nn.Parameter(positions.to(torch.get_default_device()), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, kernels, attend) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_values)
        self.run_block: Run = run_module
        self._initialise()

    @property
    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def set_run_attention(self, run: Run) -> None:
        """How every block calls its attention: as `run(attention, y)`."""
        for block in self._blocks:
            block.run_attention = run

    def modulation_layers(self, depth: int) -> list[nn.Linear]:
        """From SiLU(c) to what modulates the first `depth` blocks and the part after them; run before any block."""
        parts: list[Block | FinalLayer] = [*self._blocks, self.final_layer]
        return [cast(nn.Linear, part.adaLN_modulation[1]) for part in parts[: depth + 1]]

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.layers:
            nn.init.normal_(layer.weight, std=0.02)
        for layer in self.modulation_layers(self.config.depth):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed_tokens(self, x: Tensor) -> Tensor:
        """(B, C, S, S) → (B, N, D): patches with positions, in the weights' dtype."""
        return self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed

    def _modulations(self, c: Tensor, depth: int) -> list[Tensor]:
        """What the first `depth` blocks and the part after them are modulated by, from SiLU(c) (B, D).

        As one product the weights are laid end to end for it, which costs a pass over them; names stay as published.
        """
        layers = self.modulation_layers(depth)
        if self.config.modulation == "per_block":
            return [layer(c) for layer in layers]
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        # One split, whose backward is one concatenation: slices would each fill a gradient of the whole width.
        return list(F.linear(c, weight, bias).split([layer.out_features for layer in layers], dim=1))

    def _trunk(
        self, tokens: Tensor, t: Tensor, labels: Tensor, depth: int, taps: tuple[int, ...] = ()
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """Runs blocks 1..depth; returns the streams after `taps` (0: the tokens), after `depth`, and the next y."""
        c = F.silu(self.t_embedder(t) + self.y_embedder(labels))  # (B, D)
        # (B, 6D) from each block, (B, 2D) from the final layer.
        modulations = self._modulations(c, depth)
        shifts_scales = [m.chunk(m.shape[1] // self.config.width, dim=1)[:2] for m in modulations]
        x, tapped = tokens, {0: tokens}
        y = self.kernels.norm_modulate(x, *shifts_scales[0])
        for number, block in enumerate(self._blocks[:depth], start=1):
            x, y = self.run_block(block, x, y, modulations[number - 1], *shifts_scales[number])
            if number in taps:
                tapped[number] = x
        return tapped, x, y

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, tap: int | tuple[int, ...] = 0) -> tuple[Tensor, Any]:
        """x (B, C, S, S), t (B,), labels (B,) → velocity (B, C, S, S) and the stream after block `tap` (B, N, D).

        Blocks count from 1; with tap = 0 the second result is the embedded input. A tuple of blocks gives a tuple of
        their streams.
        """
        taps = tap if isinstance(tap, tuple) else (tap,)
        tapped, _, y = self._trunk(self.embed_tokens(x), t, labels, self.config.depth, taps)
        velocity = unpatchify(self.final_layer(y), self.config.patch, self.config.channels)
        return velocity, tuple(tapped[number] for number in taps) if isinstance(tap, tuple) else tapped[tap]

    def features(self, x: Tensor, t: Tensor, labels: Tensor, depth: int) -> Tensor:
        """The stream after block `depth` (B, N, D); nothing after it is computed."""
        return self._trunk(self.embed_tokens(x), t, labels, depth)[1]

    def guided_features(
        self, x: Tensor, t: Tensor, labels: Tensor, depth: int, branches: Branches = batched
    ) -> tuple[Tensor, Tensor]:
        """The streams after block `depth` with the labels and with the null label, each (B, N, D).

        Both share the patch embedding and run as `branches` has it; nothing after block `depth` is computed.
        """

        def features(tokens: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self._trunk(tokens, t, labels, depth)[1]

        return branches(features, self.embed_tokens(x), t, labels, torch.full_like(labels, self.null_label))


def unfilled(
    config: Model, kernels: KernelTable, device: torch.device, dtype: torch.dtype,
    attend: Attend = BACKENDS["sdpa"].attend,
) -> SiT:  # fmt: skip
    """A SiT on `device` whose weights are not drawn, for one that takes all of them over: it costs no time."""
    with torch.device("meta"), _NothingDrawn():
        model = SiT(config, kernels, attend)
    return model.to(dtype).to_empty(device=device)


class _NothingDrawn(TorchFunctionMode):
    """Leaves nn.init out: of a weight without memory there is nothing to fill, and normal_ would import a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def unpatchify(patches: Tensor, patch: int, channels: int) -> Tensor:
    """(B, N, p·p·C), channels last within a patch, → (B, C, S, S)."""
    batch, tokens, _ = patches.shape
    side = math.isqrt(tokens)
    grid = patches.view(batch, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)


def build(config: Model, kernels: KernelTable, seed: int, attend: Attend = BACKENDS["sdpa"].attend) -> SiT:
    """A SiT with published initialisation, drawn from `seed` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SiT(config, kernels, attend)
