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
    PatchEmbed,
    Run,
    ScaleWeight,
    TimestepEmbedder,
    adaln_options,
    bias_left,
    fixed_positions,
    head_norm,
    mlp,
    norm_weight,
    queries_keys_values,
    run_module,
    weighed,
)
from st_fast.model.layout import Groups, Layout
from st_fast.model.transformer import INTERNAL, DiffusionTransformer
from st_fast.model.walk import of_groups
from st_fast.recipe.schema import Model


class LabelEmbedder(nn.Module):
    """Labels (B,) → (B, D). The last row is the null label's, there if class dropout trains it."""

    def __init__(self, num_classes: int, width: int, with_null: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + with_null, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) → (B, N, D). With `value_residual` its values are mixed with block 1's, and
    block 1 (`first`) gives its own beside the output."""

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend, first: bool) -> None:
        super().__init__()
        width, self.heads, self.kernels, self.attend = config.width, config.heads, kernels, attend
        self.gives_values, self.packed = config.value_residual and first, not config.value_residual
        linear = BlockLinear if config.qk_norm or config.rope else Linear
        self.qkv = linear(width, 3 * width, kernels, config.qkv_bias)
        self.proj = BlockLinear(width, width, kernels)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        if config.value_residual and not first:
            self.v1_lambda = nn.Parameter(torch.full((1,), 0.5))

    def forward(
        self, y: Tensor, groups: Groups | None = None, rope: Tensor | None = None, v1: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y (B, N, D), its tokens in groups or all attending to all; rope (1 or B, N, d), v1 (B, N, H, d)."""
        qkv = self.qkv(y).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, d)
        if self.packed and self.q_norm is None and rope is None:
            return self.proj(attend_packed(self.attend, qkv, groups).flatten(2))
        q, k, own = queries_keys_values(self.kernels, qkv, self.q_norm, self.k_norm, rope, bias_left(self.qkv))
        v = own if v1 is None else torch.lerp(own, v1.transpose(1, 2), self.v1_lambda)  # (B, H, N, d) each
        out = self.proj(within_groups(self.attend, q, k, v, groups).transpose(1, 2).flatten(2))
        return (out, own.transpose(1, 2)) if self.gives_values else out


class Block(nn.Module):
    """A transformer block with adaLN-Zero: takes and returns the residual stream and the next modulated input."""

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend, first: bool = False) -> None:
        super().__init__()
        self.kernels, self._adaln = kernels, adaln_options(config)
        self.norm1, self.norm2 = norm_weight(config), norm_weight(config)
        self.attn = Attention(config, kernels, attend, first)
        self.mlp = mlp(config, kernels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.run_attention: Run = run_module

    def forward(
        self, x: Tensor, y: Tensor, modulation: Tensor, next_shift: Tensor, next_scale: Tensor,
        groups: Groups | None = None, rope: Tensor | None = None, v1: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """x, y (B, N, D); modulation (B, 6D) → the block's output and y of the next block, both (B, N, D).

        Where tokens are in several groups, the modulation is each group's: (B, G, 6D). With RoPE, rope (1 or B, N, d)
        are the tokens' angles; with `value_residual` v1 (B, N, H, d) are block 1's values, which that one gives third.
        """
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)  # (B, D) or (B, G, D) each
        scale_mlp, shift_mlp, gate_attn, gate_mlp = weighed(self.norm2, scale_mlp, shift_mlp, gate_attn, gate_mlp)
        fused = partial(self.kernels.gate_residual_norm_modulate, **self._adaln, **of_groups(groups))
        attended = self.run_attention(self.attn, y, groups, rope, v1)
        attended, *values = attended if isinstance(attended, tuple) else (attended,)
        x, y = fused(x, attended, gate_attn, shift_mlp, scale_mlp, a_bias=bias_left(self.attn.proj))
        x, y = fused(x, self.mlp(y), gate_mlp, next_shift, next_scale, a_bias=bias_left(self.mlp.last))
        return x, y, *values


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
        self.blocks = nn.ModuleList(Block(config, kernels, attend, not number) for number in range(config.depth))
        self.final_layer = FinalLayer(config)
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

    def norm_weights(self, depth: int) -> list[ScaleWeight | None]:
        return [block.norm1 for block in self._blocks[:depth]] + [
            self._blocks[depth].norm1 if depth < self.config.depth else self.final_layer.norm_final
        ]

    def null_condition(self, count: int) -> Tensor:
        return torch.full((count,), self.config.num_classes, device=self.device)

    def use_null(self, null: Tensor) -> None:
        """A row of the labels' table is for it."""

    def _initialise_condition(self) -> None:
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def _trunk(
        self, tokens: Tensor, t: Tensor, condition: Tensor, depth: int, taps: tuple[int, ...] = (),
        layout: Layout | None = None, rope: Tensor | None = None, skip: bool = False,
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:  # fmt: skip
        labels = self.y_embedder(condition)
        c = F.silu(self.t_embedder(t) + (labels if t.ndim == 1 else labels[:, None]))  # (B, D) or (B, G, D)
        # (B, 6D) from each block, (B, 2D) from the final layer; or each group's.
        modulations = self._modulations(c, depth)
        following = self._following(modulations, self.norm_weights(depth))
        walk = self._walk(layout, tokens, following, rope)
        for number, block in enumerate(self._blocks[:depth], start=1):
            if skip and walk.skipped(number):
                continue
            walk.enter(number)
            inputs = walk.x, walk.y, modulations[number - 1], *following[number], walk.groups, walk.rope, walk.v1
            walk.leave(number, *self.run_block(block, *inputs), tapped=number in taps)
            if number == self.config.internal_head and INTERNAL in taps:
                walk.tapped[INTERNAL] = self._internal_patches(walk, c)
        return walk.tapped, walk.x, walk.image(walk.y)
