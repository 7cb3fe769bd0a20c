"""The networks of the published loop (`bench.published`), written plainly: eager PyTorch and nothing fused.

SiT as released with arXiv 2601.07773, and the MMDiT that REPA's and its text-to-image scripts train: SD3's joint blocks
(arXiv 2403.03206), the last of which has the inputs of the attention alone for the text. Names are the published keys,
so a state of st_fast's network loads into the plain one.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.recipe.schema import Model


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B, H, N, d)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class PlainMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlainBlock(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = PlainAttention(config.width, config.heads, bool(config.qk_norm))
        self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.mlp = PlainMlp(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PlainTimes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128).to(t.device)
        angles = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class PlainFinal(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=-1)))


class PlainNetwork(nn.Module):
    """If it is given a `head`, that turns the image's stream after block `tap` (B, N, D) into what is supervised."""

    blocks: nn.ModuleList

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config, self.tap = config, 0
        patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = PlainTimes(config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width), requires_grad=False)
        self.final_layer = PlainFinal(config.width, config.patch**2 * config.channels)
        self.head: nn.Module | None = None

    @abstractmethod
    def embed(self, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """t (B,), condition (B, …) → c (B, D), and the text's stream (B, L, D) where there is one."""

    @abstractmethod
    def null_like(self, condition: Tensor) -> Tensor:
        """What stands for no condition, in the place of each of these (B, …)."""

    @abstractmethod
    def some_condition(self, count: int, device: torch.device) -> Tensor:
        """(count, …): random ones."""

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p·p·C) → (B, C, S, S)."""
        side, p, c = math.isqrt(patches.shape[1]), self.config.patch, self.config.channels
        grid = patches.reshape(len(patches), side, side, p, p, c)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(patches), c, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, until: int = 0) -> tuple[Tensor, Tensor | None]:
        """x (B, C, S, S), t (B,), condition (B, …) → velocity and the head's output; with `until`, that block's."""
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        c, text = self.embed(t, condition)
        supervised = None
        for number, block in enumerate(self.blocks, start=1):
            if text is None:
                x = block(x, c)
            else:
                x, text = block(x, c, text)
            if number == until:
                return x, None
            if number == self.tap and self.head is not None:
                supervised = self.head(x)
        return self.unpatchify(self.final_layer(x, c)), supervised


class PlainSiT(PlainNetwork):
    """Its condition is the class labels (B,)."""

    def __init__(self, config: Model) -> None:
        super().__init__(config)
        labels = nn.Embedding(config.num_classes + (config.class_dropout > 0), config.width)
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))

    def embed(self, t: Tensor, condition: Tensor) -> tuple[Tensor, None]:
        return self.t_embedder(t) + self.y_embedder["embedding_table"](condition), None

    def null_like(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.config.num_classes)

    def some_condition(self, count: int, device: torch.device) -> Tensor:
        return torch.randint(self.config.num_classes, (count,), device=device)


class PlainJointAttention(nn.Module):
    """One stream's side of the joint attention; of the text's last block the inputs alone."""

    def __init__(self, config: Model, last: bool) -> None:
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.heads, self.qkv = config.heads, nn.Linear(width, 3 * width)
        if not last:
            self.proj = nn.Linear(width, width)
        self.ln_q = nn.LayerNorm(head, eps=1e-6) if bool(config.qk_norm) else nn.Identity()
        self.ln_k = nn.LayerNorm(head, eps=1e-6) if bool(config.qk_norm) else nn.Identity()

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) → q, k, v (B, N, H, d)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).unbind(2)
        return self.ln_q(q), self.ln_k(k), v


class PlainStream(nn.Module):
    """One stream's part of a joint block."""

    def __init__(self, config: Model, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.attn = PlainJointAttention(config, last)
        if not last:
            self.norm2 = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
            self.mlp = PlainMlp(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, (2 if last else 6) * config.width))

    def before(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """The attention's inputs, and what is left of the modulation."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.last else 6, dim=-1)
        return self.attn.inputs(modulate(self.norm1(x), shift, scale)), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """x, attended (B, N, D) → the stream after the block."""
        gate_attn, shift_mlp, scale_mlp, gate_mlp = rest
        x = x + gate_attn.unsqueeze(1) * self.attn.proj(attended)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PlainJointBlock(nn.Module):
    def __init__(self, config: Model, last: bool) -> None:
        super().__init__()
        self.context_block, self.x_block = PlainStream(config, last), PlainStream(config, last=False)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        of_text, rest_text = self.context_block.before(text, c)
        of_image, rest_image = self.x_block.before(x, c)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(of_text, of_image, strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L + N, D)
        context, image = out[:, : text.shape[1]], out[:, text.shape[1] :]
        x = self.x_block.after(x, image, rest_image)
        return x, self.context_block.after(text, context, rest_text) if rest_text else None


class PlainMMDiT(PlainNetwork):
    """Its condition is the states of captions (B, L, W)."""

    def __init__(self, config: Model) -> None:
        super().__init__(config)
        self.context_embedder = nn.Linear(config.text_width, config.width)
        self.null_context = nn.Parameter(torch.zeros(1, config.text_length, config.text_width), requires_grad=False)
        last = config.depth - 1
        self.joint_blocks = nn.ModuleList(PlainJointBlock(config, number == last) for number in range(config.depth))

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The joint blocks."""
        return self.joint_blocks

    def embed(self, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        return self.t_embedder(t), self.context_embedder(condition.to(self.pos_embed.dtype))

    def null_like(self, condition: Tensor) -> Tensor:
        return self.null_context.expand_as(condition)

    def some_condition(self, count: int, device: torch.device) -> Tensor:
        return torch.randn(count, self.config.text_length, self.config.text_width, device=device)


def plain_network(config: Model) -> PlainNetwork:
    """That of the architecture, with weights as PyTorch draws them."""
    return PlainSiT(config) if config.network == "sit" else PlainMMDiT(config)
