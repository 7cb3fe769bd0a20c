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


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then shift and scale: x (B, N, D), shift and scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


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


class Attention(nn.Module):
    """Self-attention, with LayerNorm on queries and keys if `qk_norm`."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, y: Tensor) -> Tensor:
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with adaLN-Zero."""

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = named(fc1=nn.Linear(width, hidden), act=nn.GELU("tanh"), fc2=nn.Linear(hidden, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        return x + mlp_gate[:, None] * self.mlp(modulated(x, mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """(B, N, D) → (B, N, p·p·C)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class SiTTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """The velocity model. `flow`, `latent_scale` and what follows it are facts that travel with the weights."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, depth: int, width: int, heads: int, patch: int, channels: int, latent_size: int | Sequence[int],
        num_classes: int, class_dropout: float = 0.1, mlp_ratio: float = 4.0, qk_norm: bool = True,
        flow: str = "linear", latent_scale: float | None = None, name: str = "custom", step: int = 0,
        model_type: str = "sit", format: str = "st_fast.sit", version: int = 1, latent_shift: float | None = None,
        latents_mean: tuple[float, ...] = (), latents_std: tuple[float, ...] = (), vae: str = "", vae_sha256: str = "",
        prediction: str = "velocity", internal_head: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.x_embedder = named(proj=nn.Conv2d(channels, width, patch, stride=patch))
        self.t_embedder = named(mlp=time)
        # The last row, if class dropout trained it, stands for no class.
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + (class_dropout > 0), width))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid(latent_size, patch)), width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, int(width * mlp_ratio), qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * channels)
        if internal_head:  # a second final layer, after that block
            self.final_layer_xr = FinalLayer(width, patch**2 * channels)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, internal: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W), t (B,) in [0, 1], labels (B,); `num_classes` is the null label → (B, C, H, W).

        With `internal`, also the internal head's velocity.
        """
        dtype = self.pos_embed.dtype
        tokens = self.x_embedder(x.to(dtype)).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(frequencies(t).to(dtype)) + self.y_embedder(labels)
        shallow = tokens
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c)
            shallow = tokens if number == self.config.internal_head else shallow
        velocity = unpatchified(self.config, self.final_layer(tokens, c), x, t)
        return (velocity, unpatchified(self.config, self.final_layer_xr(shallow, c), x, t)) if internal else velocity
