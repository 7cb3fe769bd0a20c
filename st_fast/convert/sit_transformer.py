"""SiT (arXiv 2401.08740) as a diffusers model, for inference: x_t, t and labels to the velocity. t = 1 is noise.

Plain PyTorch with the published key names; written by st_fast, which trained the weights, and needs nothing of it.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FREQUENCIES = 256


class ModulatedNorm(nn.Module):
    """LayerNorm, or RMSNorm with or without a weight, then shift and scale (B, D): x (B, N, D) → (B, N, D)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.rms = config.norm != "layer"
        if config.norm == "rms_affine":
            self.weight = nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        weight = getattr(self, "weight", None)
        h = F.rms_norm(x, x.shape[-1:], weight, 1e-6) if self.rms else F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return h * (1 + scale[:, None]) + shift[:, None]


def head_norm(config: Any) -> nn.Module:
    """The norm of queries, or of keys, within each head."""
    if config.qk_norm in (False, "off"):
        return nn.Identity()
    return (nn.RMSNorm if config.qk_norm == "rms" else nn.LayerNorm)(config.width // config.heads, eps=1e-6)


def grid(latent_size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """(rows, columns) of a latent's patches: of a square, or of height and width."""
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    return height // patch, width // patch


def velocity_of_x(predicted: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity where the network predicts the clean latent: (x_t - x) / t, in float32, t at least 0.05."""
    return (x.float() - predicted.float()) / t.float().clamp(min=0.05)[:, None, None, None]


def unpatchified(config: Any, patches: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What a final layer gives (B, N, p·p·C), for x (B, C, H, W) and t (B,), as a velocity (B, C, H, W)."""
    patch, (rows, columns) = config.patch, grid(config.latent_size, config.patch)
    out = patches.view(-1, rows, columns, patch, patch, config.channels).permute(0, 5, 1, 3, 2, 4)
    out = out.flatten(4, 5).flatten(2, 3)
    return out if config.prediction == "velocity" else velocity_of_x(out, x, t)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after the other, under the published names."""
    return nn.Sequential(OrderedDict(modules))


def frequencies(t: Tensor) -> Tensor:
    """t (B,) → (B, FREQUENCIES) cosines and sines."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(steps * (-math.log(10_000) / half))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_angles(config: Any, registers: int, device: torch.device) -> Tensor | None:
    """(2, R + N, d/2) float32: cosines and sines of the angles by which RoPE turns the pairs of a head's channels.

    The first half of the pairs turns by a token's row, the other by its column; registers stand in front and don't
    turn. None without RoPE.
    """
    if config.position == "sincos":
        return None
    head = config.width // config.heads
    frequencies = 10_000.0 ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))
    sides = (torch.arange(side, dtype=torch.float64) for side in grid(config.latent_size, config.patch))
    places = torch.meshgrid(*sides, indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * frequencies for place in places], dim=1)
    angles = torch.cat((angles.new_zeros(registers, head // 2), angles))
    return torch.stack((angles.cos(), angles.sin())).float().to(device)


def rotated(x: Tensor, angles: Tensor | None) -> Tensor:
    """x (B, H, N, d) with each pair of neighbouring channels turned by its angle, of cosine and sine (2, N, d/2)."""
    if angles is None:
        return x
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), angles
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """A gated MLP: w3(SiLU(gate) · value), gate and value by w12."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, y: Tensor) -> Tensor:
        gate, value = self.w12(y).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SquaredReLU(nn.Module):
    """relu(h)²."""

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h).square()


def mlp(config: Any) -> nn.Module:
    """A block's MLP."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    if config.mlp == "swiglu":
        return SwiGLU(width, int(2 / 3 * hidden))
    act = SquaredReLU() if config.mlp == "relu2" else nn.GELU("tanh")
    return named(fc1=nn.Linear(width, hidden), act=act, fc2=nn.Linear(hidden, width))


class Attention(nn.Module):
    """Self-attention; with `value_residual` its values are mixed with those of the first block, in a learned share."""

    def __init__(self, config: Any, first: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        if config.value_residual and not first:
            self.v1_lambda = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, y: Tensor, angles: Tensor | None, v1: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (B, N, D), v1 (B, H, N, d) → (B, N, D) and the block's own values (B, H, N, d)."""
        q, k, own = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotated(self.q_norm(q), angles), rotated(self.k_norm(k), angles)
        v = own if v1 is None else torch.lerp(own, v1, self.v1_lambda)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), own


class Block(nn.Module):
    """A transformer block with adaLN-Zero."""

    def __init__(self, config: Any, first: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = ModulatedNorm(config), ModulatedNorm(config)
        self.attn, self.mlp = Attention(config, first), mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, c: Tensor, angles: Tensor | None, v1: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        attended, values = self.attn(self.norm1(x, shift, scale), angles, v1)
        x = x + gate[:, None] * attended
        return x + mlp_gate[:, None] * self.mlp(self.norm2(x, mlp_shift, mlp_scale)), values


class FinalLayer(nn.Module):
    """(B, N, D) → (B, N, p·p·C)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm_final = ModulatedNorm(config)
        self.linear = nn.Linear(config.width, config.patch**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


def fixed_positions(config: Any) -> nn.Parameter | None:
    """(1, N, D), which the weights' file fills; None where RoPE alone tells places."""
    if config.position == "rope":
        return None
    tokens = math.prod(grid(config.latent_size, config.patch))
    return nn.Parameter(torch.zeros(1, tokens, config.width), requires_grad=False)


def embedded(x_embedder: Any, positions: Tensor | None, x: Tensor) -> Tensor:
    """x (B, C, H, W) → tokens (B, N, D) in the weights' dtype."""
    tokens: Tensor = x_embedder(x.to(x_embedder.proj.weight.dtype)).flatten(2).transpose(1, 2)
    return tokens if positions is None else tokens + positions


class SiTTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """The velocity model. `flow`, `latent_scale` and what follows it are facts that travel with the weights."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, depth: int, width: int, heads: int, patch: int, channels: int, latent_size: int | Sequence[int],
        num_classes: int, class_dropout: float = 0.1, mlp_ratio: float = 4.0, qk_norm: bool | str = True,
        flow: str = "linear", latent_scale: float | None = None, name: str = "custom", step: int = 0,
        model_type: str = "sit", format: str = "st_fast.sit", version: int = 1, latent_shift: float | None = None,
        latents_mean: tuple[float, ...] = (), latents_std: tuple[float, ...] = (), vae: str = "", vae_sha256: str = "",
        prediction: str = "velocity", internal_head: int = 0, mlp: str = "gelu", norm: str = "layer",
        position: str = "sincos", qkv_bias: bool = True, value_residual: bool = False, registers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.x_embedder = named(proj=nn.Conv2d(channels, width, patch, stride=patch))
        self.t_embedder = named(mlp=time)
        # The last row, if class dropout trained it, stands for no class.
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + (class_dropout > 0), width))
        self.pos_embed = fixed_positions(self.config)
        self.blocks = nn.ModuleList(Block(self.config, first=number == 0) for number in range(depth))
        self.final_layer = FinalLayer(self.config)
        if internal_head:  # a second final layer, after that block
            self.final_layer_xr = FinalLayer(self.config)
        if registers:  # learned tokens in front of the image's
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, internal: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W), t (B,) in [0, 1], labels (B,); `num_classes` is the null label → (B, C, H, W).

        With `internal`, also the internal head's velocity.
        """
        tokens, registers = embedded(self.x_embedder, self.pos_embed, x), self.config.registers
        if registers:
            tokens = torch.cat((self.register_tokens.expand(len(x), -1, -1), tokens), dim=1)
        c = self.t_embedder(frequencies(t).to(tokens.dtype)) + self.y_embedder(labels)
        angles, v1, shallow = rope_angles(self.config, registers, tokens.device), None, tokens
        for number, block in enumerate(self.blocks, start=1):
            tokens, values = block(tokens, c, angles, v1)
            v1 = values if number == 1 and self.config.value_residual else v1
            shallow = tokens if number == self.config.internal_head else shallow
        velocity = unpatchified(self.config, self.final_layer(tokens[:, registers:], c), x, t)
        if not internal:
            return velocity
        return velocity, unpatchified(self.config, self.final_layer_xr(shallow[:, registers:], c), x, t)
