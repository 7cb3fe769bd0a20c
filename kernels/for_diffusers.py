"""The fused forwards of diffusers' adaLN blocks: layers without constructors, as in `layers.py`.

Written after diffusers 0.42; `patch.py` compares each with the class it finds. `AdaLayerNormSingle` only makes the
modulation: what it modulates is in `BasicTransformerBlock`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers import Layer, gated, gated_modulated, modulated

Forward = Callable[..., Any]


def _own(layer: type[nn.Module], module: nn.Module) -> Forward:
    """The forward that `layer.forward` stands in for, whether `layer` is mixed in or bound to the instance."""
    if isinstance(module, layer):
        return cast(Any, super(layer, module)).forward  # type: ignore[no-any-return]
    return functools.partial(type(module).forward, module)


class FusedAdaLayerNormZero(Layer):
    """diffusers' `AdaLayerNormZero`: → y, gate_msa, shift_mlp, scale_mlp, gate_mlp."""

    emb: nn.Module | None
    linear: nn.Module
    silu: nn.Module
    norm: nn.Module

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (B, N, D); emb (B, D), or what `self.emb` makes it of."""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulated(self.norm, x, shift, scale), gate_msa, shift_mlp, scale_mlp, gate_mlp


class FusedAdaLayerNormZeroSingle(Layer):
    """diffusers' `AdaLayerNormZeroSingle`: → y, gate."""

    linear: nn.Module
    silu: nn.Module
    norm: nn.Module

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, D); emb (B, D)."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulated(self.norm, x, shift, scale), gate


class FusedAdaLayerNormContinuous(Layer):
    """diffusers' `AdaLayerNormContinuous`, the last norm of Flux and SD3."""

    linear: nn.Module
    silu: nn.Module
    norm: nn.Module

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """x (B, N, D); conditioning_embedding (B, C)."""
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return modulated(self.norm, x, shift, scale)


class FusedBasicTransformerBlock(Layer):
    """diffusers' `BasicTransformerBlock` with `ada_norm_zero` (DiT) or with `ada_norm_single` (PixArt, Latte)."""

    norm_type: str
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    attn1: nn.Module
    attn2: nn.Module | None
    ff: nn.Module
    only_cross_attention: bool
    scale_shift_table: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (B, N, D). A chunked feed-forward, position embeddings in the block and GLIGEN run its own."""
        x, zero, kwargs = hidden_states, self.norm_type == "ada_norm_zero", cross_attention_kwargs or {}
        fused = self.attn2 is None if zero else self.norm_type == "ada_norm_single"
        if not fused or x.dim() != 3 or self.pos_embed is not None or self._chunk_size is not None or kwargs:
            return cast(
                Tensor,
                _own(FusedBasicTransformerBlock, self)(
                    x, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs,
                    class_labels, added_cond_kwargs,
                ),
            )  # fmt: skip
        if zero:
            y, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        else:
            table = self.scale_shift_table[None] + cast(Tensor, timestep).reshape(x.shape[0], 6, -1)  # (B, 6, D)
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.unbind(1)
            y = modulated(self.norm1, x, shift_msa, scale_msa)
        other = encoder_hidden_states if self.only_cross_attention else None
        a = self.attn1(y, encoder_hidden_states=other, attention_mask=attention_mask)
        norm = self.norm3 if zero else self.norm2
        if self.attn2 is None:
            x, y = gated_modulated(norm, x, a, gate_msa, shift_mlp, scale_mlp)
        else:
            x = gated(x, a, gate_msa)
            other, mask = encoder_hidden_states, encoder_attention_mask
            x = self.attn2(x, encoder_hidden_states=other, attention_mask=mask) + x
            y = modulated(norm, x, shift_mlp, scale_mlp)
        return gated(x, self.ff(y), gate_mlp)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FusedFluxTransformerBlock(Layer):
    """diffusers' `FluxTransformerBlock`: two streams that meet in the attention."""

    norm1: nn.Module
    norm1_context: nn.Module
    attn: nn.Module
    norm2: nn.Module
    norm2_context: nn.Module
    ff: nn.Module
    ff_context: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, N, D), encoder_hidden_states (B, T, D), temb (B, D) → the text's stream, the image's."""
        x, text = hidden_states, encoder_hidden_states
        y, gate_msa, shift, scale, gate_mlp = self.norm1(x, emb=temb)
        text_y, text_gate_msa, text_shift, text_scale, text_gate_mlp = self.norm1_context(text, emb=temb)
        a, text_a, *adapter = self.attn(
            hidden_states=y, encoder_hidden_states=text_y, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )  # fmt: skip
        x, y = gated_modulated(self.norm2, x, a, gate_msa, shift, scale)
        x = gated(x, self.ff(y), gate_mlp)
        text, text_y = gated_modulated(self.norm2_context, text, text_a, text_gate_msa, text_shift, text_scale)
        text = gated(text, self.ff_context(text_y), text_gate_mlp)
        return _clipped(text), x + adapter[0] if adapter else x


class FusedFluxSingleTransformerBlock(Layer):
    """diffusers' `FluxSingleTransformerBlock`: one stream of text and image, attention and MLP side by side."""

    norm: nn.Module
    attn: nn.Module
    proj_mlp: nn.Module
    act_mlp: nn.Module
    proj_out: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, N, D), encoder_hidden_states (B, T, D), temb (B, D) → the text's stream, the image's."""
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        y, gate = self.norm(x, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(y))
        a = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = _clipped(gated(x, self.proj_out(torch.cat([a, mlp], dim=2)), gate))
        tokens = encoder_hidden_states.shape[1]
        return x[:, :tokens], x[:, tokens:]


class FusedJointTransformerBlock(Layer):
    """diffusers' `JointTransformerBlock` (SD3); with dual attention or a chunked feed-forward, its own."""

    norm1: nn.Module
    norm1_context: nn.Module
    attn: nn.Module
    norm2: nn.Module
    norm2_context: nn.Module
    ff: nn.Module
    ff_context: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """hidden_states (B, N, D), encoder_hidden_states (B, T, D), temb (B, D) → the text's stream, the image's."""
        x, text, kwargs = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
        if self.use_dual_attention or self._chunk_size is not None:
            own = _own(FusedJointTransformerBlock, self)
            return cast("tuple[Tensor | None, Tensor]", own(x, text, temb, joint_attention_kwargs))
        y, gate_msa, shift, scale, gate_mlp = self.norm1(x, emb=temb)
        if self.context_pre_only:
            a, _ = self.attn(hidden_states=y, encoder_hidden_states=self.norm1_context(text, temb), **kwargs)
        else:
            text_y, text_gate_msa, text_shift, text_scale, text_gate_mlp = self.norm1_context(text, emb=temb)
            a, text_a = self.attn(hidden_states=y, encoder_hidden_states=text_y, **kwargs)
        x, y = gated_modulated(self.norm2, x, a, gate_msa, shift, scale)
        x = gated(x, self.ff(y), gate_mlp)
        if self.context_pre_only:
            return None, x
        text, text_y = gated_modulated(self.norm2_context, text, text_a, text_gate_msa, text_shift, text_scale)
        return gated(text, self.ff_context(text_y), text_gate_mlp), x
