"""MMDiT (arXiv 2403.03206) as a diffusers model, for inference: x_t, t and the states of captions to the velocity.

t = 1 is noise. Plain PyTorch with the published key names, and `null_context`, the states of the empty caption; written
by st_fast, which trained the weights, and needs nothing of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from st_fast.convert.sit_transformer import (
    FREQUENCIES,
    FinalLayer,
    ModulatedNorm,
    embedded,
    fixed_positions,
    frequencies,
    head_norm,
    mlp,
    named,
    rope_angles,
    rotated,
    unpatchified,
)


class StreamAttention(nn.Module):
    """One stream's queries, keys and values (with a norm of the first two if `qk_norm`), and its projection."""

    def __init__(self, config: Any, whole: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        if whole:
            self.proj = nn.Linear(config.width, config.width)
        self.ln_q, self.ln_k = head_norm(config), head_norm(config)

    def forward(self, y: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) → q, k, v (B, H, N, d)."""
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return rotated(self.ln_q(q), angles), rotated(self.ln_k(k), angles), v


class StreamBlock(nn.Module):
    """One stream's weights of a block; unless `whole` it ends with its part of the attention."""

    def __init__(self, config: Any, whole: bool) -> None:
        super().__init__()
        self.norm1, self.attn = ModulatedNorm(config), StreamAttention(config, whole)
        if whole:
            self.norm2, self.mlp = ModulatedNorm(config), mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, (6 if whole else 2) * config.width))

    def before(
        self, x: Tensor, c: Tensor, angles: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """x (B, N, D), c (B, D) → q, k, v, and what `after` needs."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(6 if hasattr(self, "mlp") else 2, dim=1)
        return self.attn(self.norm1(x, shift, scale), angles), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """x, attended (B, N, D) → (B, N, D)."""
        gate, mlp_shift, mlp_scale, mlp_gate = rest
        x = x + gate[:, None] * self.attn.proj(attended)
        return x + mlp_gate[:, None] * self.mlp(self.norm2(x, mlp_shift, mlp_scale))


class JointBlock(nn.Module):
    """Image and text with weights of their own and one attention over the tokens of both, the text's first.

    RoPE turns the image's alone.
    """

    def __init__(self, config: Any, last: bool) -> None:
        super().__init__()
        self.context_block, self.x_block = StreamBlock(config, whole=not last), StreamBlock(config, whole=True)
        self.last = last

    def forward(self, x: Tensor, u: Tensor, c: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, D), u (B, L, D), c (B, D) → x, u; after the last block the text's is as it was."""
        (image, rest), (text, text_rest) = self.x_block.before(x, c, angles), self.context_block.before(u, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image))  # noqa: B905  # both are q, k, v
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if not self.last:
            u = self.context_block.after(u, attended[:, : u.shape[1]], text_rest)
        return self.x_block.after(x, attended[:, u.shape[1] :], rest), u


class MMDiTTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """The velocity model. `flow`, `latent_scale` and what follows them are facts that travel with the weights."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, depth: int, width: int, heads: int, patch: int, channels: int, latent_size: int | Sequence[int],
        text_width: int, text_length: int, class_dropout: float = 0.1, mlp_ratio: float = 4.0,
        qk_norm: bool | str = True, flow: str = "linear", latent_scale: float | None = None, name: str = "custom",
        step: int = 0,
        text_encoder: str = "", text_encoder_sha256: str = "", text_mask: bool = False, network: str = "mmdit",
        model_type: str = "mmdit", format: str = "st_fast.sit", version: int = 1, latent_shift: float | None = None,
        latents_mean: tuple[float, ...] = (), latents_std: tuple[float, ...] = (), vae: str = "", vae_sha256: str = "",
        prediction: str = "velocity", internal_head: int = 0, mlp: str = "gelu", norm: str = "layer",
        position: str = "sincos", qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.x_embedder = named(proj=nn.Conv2d(channels, width, patch, stride=patch))
        self.t_embedder = named(mlp=time)
        self.context_embedder = nn.Linear(text_width, width)
        self.null_context = nn.Parameter(torch.zeros(1, text_length, text_width), requires_grad=False)
        self.pos_embed = fixed_positions(self.config)
        self.joint_blocks = nn.ModuleList(
            JointBlock(self.config, last=number == depth) for number in range(1, depth + 1)
        )
        self.final_layer = FinalLayer(self.config)
        if internal_head:  # a second final layer, after that block
            self.final_layer_xr = FinalLayer(self.config)

    def forward(self, x: Tensor, t: Tensor, states: Tensor, internal: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W), t (B,) in [0, 1], states (B, L, W) of captions' tokens → (B, C, H, W).

        With `internal`, also the internal head's velocity.
        """
        tokens = embedded(self.x_embedder, self.pos_embed, x)
        c, u = self.t_embedder(frequencies(t).to(tokens.dtype)), self.context_embedder(states.to(tokens.dtype))
        angles, shallow = rope_angles(self.config, 0, tokens.device), tokens
        for number, block in enumerate(self.joint_blocks, start=1):
            tokens, u = block(tokens, u, c, angles)
            shallow = tokens if number == self.config.internal_head else shallow
        velocity = unpatchified(self.config, self.final_layer(tokens, c), x, t)
        return (velocity, unpatchified(self.config, self.final_layer_xr(shallow, c), x, t)) if internal else velocity
