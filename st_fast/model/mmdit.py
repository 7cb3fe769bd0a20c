"""MMDiT: text to image by joint attention (arXiv 2403.03206), as REPA trains it on COCO (arXiv 2410.06940, appendix K).

Image and text have weights of their own in every block and one attention over the tokens of both. Times modulate both
streams; the text enters only as tokens. Keys are the published ones, but for `null_context`, which those files lack:
the states of the empty caption. Shapes: B samples, N image tokens, L text tokens, W text width, D width, H heads.

As in `sit`, each residual stream travels with the modulated input of its next sub-layer: the image's x with y, and the
text's u with z. Of the last block the text needs the inputs of the attention alone, so its stream ends there; so it
does for a teacher, of which the last block that runs is as good as the last.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.attention import BACKENDS, Attend, attend_packed
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
from st_fast.model.layout import Layout
from st_fast.model.transformer import INTERNAL, DiffusionTransformer
from st_fast.recipe.schema import Model


class StreamAttention(nn.Module):
    """One stream's side of the joint attention: its queries, keys and values, and the projection of what it gets."""

    def __init__(self, config: Model, kernels: KernelTable, with_output: bool) -> None:
        super().__init__()
        width, self.heads, self.kernels = config.width, config.heads, kernels
        linear = BlockLinear if config.qk_norm or config.rope else Linear
        self.qkv = linear(width, 3 * width, kernels, config.qkv_bias)
        if with_output:
            self.proj = BlockLinear(width, width, kernels)
        self.ln_q, self.ln_k = head_norm(config), head_norm(config)

    def packed(self, y: Tensor) -> Tensor:
        """(B, N, D) → (B, N, 3, H, d)."""
        return self.qkv(y).unflatten(-1, (3, self.heads, -1))

    def normed(self, y: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) → q, k, v (B, H, N, d), queries and keys normalised and turned by rope (1 or B, N, d)."""
        return queries_keys_values(self.kernels, self.packed(y), self.ln_q, self.ln_k, rope, bias_left(self.qkv))


class StreamBlock(nn.Module):
    """One stream's weights of a block; the text's last one has the inputs of the attention alone."""

    def __init__(self, config: Model, kernels: KernelTable, whole: bool) -> None:
        super().__init__()
        self.kernels, self._adaln = kernels, adaln_options(config)
        self.norm1, self.norm2 = norm_weight(config), norm_weight(config) if whole else None
        self.attn = StreamAttention(config, kernels, with_output=whole)
        if whole:
            self.mlp = mlp(config, kernels)
        modulated = nn.Linear(config.width, (6 if whole else 2) * config.width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulated)

    @property
    def modulation(self) -> nn.Linear:
        """From SiLU(c) to the block's shifts, scales and gates."""
        return cast(nn.Linear, self.adaLN_modulation[1])

    def after_attention(
        self, x: Tensor, attended: Tensor, modulation: Tensor, next_shift: Tensor, next_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, attended (B, N, D); modulation (B, 6D) → the block's output and its next input, both (B, N, D)."""
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)  # (B, D) each
        scale_mlp, shift_mlp, gate_attn, gate_mlp = weighed(self.norm2, scale_mlp, shift_mlp, gate_attn, gate_mlp)
        fused = partial(self.kernels.gate_residual_norm_modulate, **self._adaln)
        x, y = fused(x, attended, gate_attn, shift_mlp, scale_mlp, a_bias=bias_left(self.attn.proj))
        return fused(x, self.mlp(y), gate_mlp, next_shift, next_scale, a_bias=bias_left(self.mlp.last))


class JointBlock(nn.Module):
    """A block of both streams."""

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend, last: bool) -> None:
        super().__init__()
        self.context_block = StreamBlock(config, kernels, whole=not last)
        self.x_block = StreamBlock(config, kernels, whole=True)
        self.packed, self.attend = not (config.qk_norm or config.rope), attend
        self.run_attention: Run = run_module

    def forward(
        self, x: Tensor, y: Tensor, z: Tensor, rope: Tensor | None, modulation: Tensor, next_shift: Tensor,
        next_scale: Tensor, *text: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """x, y (B, N, D), z (B, L, D), rope (1 or B, N, d), modulation (B, 6D) → the image's output and next input.

        With `text`, which is the text's stream u (B, L, D), its modulation and next shift and scale, also the text's.
        """
        attend = self._attend_both if text else self._attend_image
        attended, *attended_text = self.run_attention(attend, y, z, rope)
        image = self.x_block.after_attention(x, attended, modulation, next_shift, next_scale)
        if not text:
            return image
        u, *rest = text
        return *image, *self.context_block.after_attention(u, attended_text[0], *rest)

    def _attend_both(self, y: Tensor, z: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        # Split, not sliced: the gradients of two slices are two tensors of the whole size, and their sum.
        text, image = self._joint(y, z, rope).split((z.shape[1], y.shape[1]), dim=1)
        return self.x_block.attn.proj(image), self.context_block.attn.proj(text)

    def _attend_image(self, y: Tensor, z: Tensor, rope: Tensor | None) -> tuple[Tensor]:
        return (self.x_block.attn.proj(self._joint(y, z, rope)[:, z.shape[1] :]),)

    def _joint(self, y: Tensor, z: Tensor, rope: Tensor | None) -> Tensor:
        """Attention over the tokens of both, the text's first: (B, L + N, D), before any projection. RoPE turns the
        image's queries and keys alone, as the text's place in a caption is in its states."""
        image, text = self.x_block.attn, self.context_block.attn
        if self.packed:
            packed = torch.cat((text.packed(z), image.packed(y)), dim=1)
            return attend_packed(self.attend, packed).flatten(2)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text.normed(z), image.normed(y, rope), strict=True))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class MMDiT(DiffusionTransformer):
    """The text-conditional network: its condition is (B, L, W), the states of a caption's tokens; c = t-embedding."""

    network = "mmdit"

    def __init__(self, config: Model, kernels: KernelTable, attend: Attend = BACKENDS["sdpa"].attend) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.context_embedder = nn.Linear(config.text_width, config.width)
        null = torch.zeros(1, config.text_length, config.text_width)
        self.null_context = nn.Parameter(null, requires_grad=False)
        self.pos_embed = fixed_positions(config)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, kernels, attend, last=number == config.depth) for number in range(1, config.depth + 1)
        )
        self.final_layer = FinalLayer(config)
        self.run_block: Run = run_module
        self._initialise(
            zero=[part.modulation for block in self._blocks for part in (block.x_block, block.context_block)]
            + [cast(nn.Linear, self.final_layer.adaLN_modulation[1])]
        )

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The joint blocks."""
        return self.joint_blocks

    @property
    def _blocks(self) -> list[JointBlock]:
        return cast("list[JointBlock]", list(self.joint_blocks))

    @property
    def constants(self) -> set[nn.Parameter]:
        return super().constants | {self.null_context}

    def set_run_attention(self, run: Run) -> None:
        for block in self._blocks:
            block.run_attention = run

    def modulation_layers(self, depth: int) -> list[nn.Linear]:
        """Of the image's `depth` blocks and the part after them, then of the text's blocks."""
        after = [block.x_block.modulation for block in self._blocks[depth : depth + 1]]
        if depth == self.config.depth:
            after = [cast(nn.Linear, self.final_layer.adaLN_modulation[1])]
        blocks = self._blocks[:depth]
        return [b.x_block.modulation for b in blocks] + after + [b.context_block.modulation for b in blocks]

    def norm_weights(self, depth: int) -> list[ScaleWeight | None]:
        after = [block.x_block.norm1 for block in self._blocks[depth : depth + 1]]
        if depth == self.config.depth:
            after = [self.final_layer.norm_final]
        blocks = self._blocks[:depth]
        return [b.x_block.norm1 for b in blocks] + after + [b.context_block.norm1 for b in blocks]

    def null_condition(self, count: int) -> Tensor:
        return self.null_context.expand(count, -1, -1)

    @torch.no_grad()
    def use_null(self, null: Tensor) -> None:
        self.null_context.copy_(null[None])

    def _initialise_condition(self) -> None:
        """Nothing beyond what every linear layer gets."""

    def _trunk(
        self, tokens: Tensor, t: Tensor, condition: Tensor, depth: int, taps: tuple[int, ...] = (),
        layout: Layout | None = None, rope: Tensor | None = None, skip: bool = False,
    ) -> tuple[dict[int, Tensor], Tensor, Tensor]:  # fmt: skip
        c = F.silu(self.t_embedder(t))  # (B, D)
        modulations = self._modulations(c, depth)
        every = self._following(modulations, self.norm_weights(depth))
        image, text = modulations[: depth + 1], modulations[depth + 1 :]
        following, following_text = every[: depth + 1], every[depth + 1 :]
        walk, u = self._walk(layout, tokens, following, rope), self.context_embedder(condition.to(tokens.dtype))
        z = self.kernels.norm_modulate(u, *following_text[0], **adaln_options(self.config))
        for number, block in enumerate(self._blocks[:depth], start=1):
            walk.enter(number)
            inputs = walk.x, walk.y, z, walk.rope, image[number - 1], *following[number]
            if number < depth:
                x, y, u, z = self.run_block(block, *inputs, u, text[number - 1], *following_text[number])
            else:
                x, y = self.run_block(block, *inputs)
            walk.leave(number, x, y, tapped=number in taps)
            if number == self.config.internal_head and INTERNAL in taps:
                walk.tapped[INTERNAL] = self._internal_patches(walk, c)
        return walk.tapped, walk.x, walk.image(walk.y)
