"""SiT: the diffusion transformer (arXiv 2401.08740; blocks of DiT, arXiv 2212.09748), with the published key names.

Shapes: B samples, N tokens, D width, H heads, d = D/H.

The residual stream x and the modulated input y of the next sub-layer travel together, so that each `x + gate·a`
and the normalisation after it are one op: also across blocks, where the next block's shift and scale are used.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.attention import BACKENDS, Attend, attend_packed, within_groups
from st_fast.model.layers import (
    BlockLinear,
    FinalLayer,
    Linear,
    Mlp,
    PatchEmbed,
    Run,
    TimestepEmbedder,
    bias_left,
    fixed_positions,
    run_module,
)
from st_fast.model.layout import Groups, Layout
from st_fast.model.transformer import INTERNAL, DiffusionTransformer, Walk, of_groups, shifts_and_scales
from st_fast.recipe.schema import Model


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

    def forward(self, y: Tensor, groups: Groups | None = None) -> Tensor:
        """y (B, N, D), its tokens in groups or all attending to all."""
        qkv = self.qkv(y).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, d)
        if self.q_norm is None or self.k_norm is None:
            return self.proj(attend_packed(self.attend, qkv, groups).flatten(2))
        q, k, v = self.kernels.qk_norm(
            qkv, self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias, self.q_norm.eps,
            qkv_bias=bias_left(self.qkv),
        )  # (B, H, N, d) each, laid out for the attention  # fmt: skip
        return self.proj(within_groups(self.attend, q, k, v, groups).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with adaLN-Zero: takes and returns the residual stream and the next modulated input."""

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend) -> None:
        super().__init__()
        self.kernels = kernels
        self.attn = Attention(config.width, config.heads, config.qk_norm, kernels, attend)
        self.mlp = Mlp(config.width, config.hidden, kernels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.run_attention: Run = run_module

    def forward(
        self, x: Tensor, y: Tensor, modulation: Tensor, next_shift: Tensor, next_scale: Tensor,
        groups: Groups | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x, y (B, N, D); modulation (B, 6D) → the block's output and y of the next block, both (B, N, D).

        Where tokens are in several groups, the modulation is each group's: (B, G, 6D).
        """
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)  # (B, D) or (B, G, D) each
        fused = partial(self.kernels.gate_residual_norm_modulate, **of_groups(groups))
        attended = self.run_attention(self.attn, y, groups)
        x, y = fused(x, attended, gate_attn, shift_mlp, scale_mlp, a_bias=bias_left(self.attn.proj))
        return fused(x, self.mlp(y), gate_mlp, next_shift, next_scale, a_bias=bias_left(self.mlp.fc2))


class SiT(DiffusionTransformer):
    """The class-conditional network: its condition is a label (B,) int64, and c = t-embedding + label embedding."""

    network = "sit"

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend = BACKENDS["sdpa"].attend) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width, with_null=config.class_dropout > 0)
        self.pos_embed = fixed_positions(config)
        self.blocks = nn.ModuleList(Block(config, kernels, attend) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_values)
        self.run_block: Run = run_module
        self._initialise(zero=self.modulation_layers(config.depth))

    @property
    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def set_run_attention(self, run: Run) -> None:
        for block in self._blocks:
            block.run_attention = run

    def modulation_layers(self, depth: int) -> list[nn.Linear]:
        parts: list[Block | FinalLayer] = [*self._blocks, self.final_layer]
        return [cast(nn.Linear, part.adaLN_modulation[1]) for part in parts[: depth + 1]]

    def null_condition(self, count: int) -> Tensor:
        return torch.full((count,), self.config.num_classes, device=self.pos_embed.device)

    def use_null(self, null: Tensor) -> None:
        """A row of the labels' table is for it."""

    def _initialise_condition(self) -> None:
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def _trunk(
        self, tokens: Tensor, t: Tensor, condition: Tensor, depth: int, taps: tuple[int, ...] = (),
        layout: Layout | None = None, skip: bool = False,
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:  # fmt: skip
        labels = self.y_embedder(condition)
        c = F.silu(self.t_embedder(t) + (labels if t.ndim == 1 else labels[:, None]))  # (B, D) or (B, G, D)
        # (B, 6D) from each block, (B, 2D) from the final layer; or each group's.
        modulations = self._modulations(c, depth)
        following = shifts_and_scales(modulations, self.config.width)
        walk = Walk(self.kernels, layout, tokens, following, self._fusion)
        for number, block in enumerate(self._blocks[:depth], start=1):
            if skip and walk.skipped(number):
                continue
            walk.enter(number)
            x, y = self.run_block(block, walk.x, walk.y, modulations[number - 1], *following[number], walk.groups)
            walk.leave(number, x, y, tapped=number in taps)
            if number == self.config.internal_head and INTERNAL in taps:
                walk.tapped[INTERNAL] = self._internal_patches(walk, c)
        return walk.tapped, walk.x, walk.y
