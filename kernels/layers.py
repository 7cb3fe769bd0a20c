"""The ops as `nn.Module`s, for blocks of one's own, and the fused forwards of DiT's and SiT's blocks.

    norm = AdaLNModulate(eps=1e-6)
    y = norm(x, shift, scale)  # LN(x)·(1 + scale) + shift; norm="rms" for RMSNorm

Modules with a constructor are used like those of `torch.nn`. The others hold nothing and compute with the attributes of
the module whose forward they stand in for. Such a class is a layer of Hugging Face's `kernels` package (what
`kernelize` binds to a module), a mixin (`class Block(FusedDiTBlock, DiTBlock)`), and what `patch.py` binds.

Shapes: x (B, N, D); a modulation (B, D) or (B, 1, D), where B may be 1. All compute in float32 (float64 for float64),
under autocast too, and return x's dtype. Modulations must have one dtype.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .adaln.definition import NORMS
from .adaln.op import gate_residual, gate_residual_norm_modulate, norm_modulate
from .attn import definition as attn
from .attn.op import attention
from .common.registry import forward_mode
from .feature_loss.definition import FEATURE_LOSSES
from .feature_loss.op import align, guided_feature_loss
from .mlp.op import gelu_tanh, linear, swiglu
from .qknorm.op import qk_norm


class Layer(nn.Module):
    """What Hugging Face's `kernels` asks of a layer: no constructor, and no member but these and `forward`."""

    has_backward = True
    can_torch_compile = True


def _row(x: Tensor, vector: Tensor) -> Tensor | None:
    """A modulation as the ops take it, (B, D), or None if it isn't one row a sample of x (B, N, D)."""
    row = vector.squeeze(1) if vector.dim() == 3 and vector.shape[1] == 1 else vector
    if x.dim() != 3 or row.dim() != 2 or row.shape[1] != x.shape[2] or row.shape[0] not in (1, x.shape[0]):
        return None
    return row if row.shape[0] == x.shape[0] else row.expand(x.shape[0], -1)


def _checked(layer: nn.Module, name: str, x: Tensor, vector: Tensor) -> Tensor:
    """A modulation as (B, D); raises ValueError for any other shape, such as one row a token."""
    row = _row(x, vector)
    if row is None:
        raise ValueError(
            f"{type(layer).__name__}: {name} has shape {tuple(vector.shape)} and x {tuple(x.shape)}; (B, D) or "
            "(B, 1, D) is needed for x (B, N, D): one row a sample, not a token"
        )
    return row


def _norm(layer: nn.Module) -> tuple[float, str]:
    """eps and kind of the layer's `norm`, a LayerNorm or RMSNorm without weight and bias; or its own `eps` where `norm`
    is the kind's name, or missing: "layer"."""
    norm = getattr(layer, "norm", None)
    if norm is None or isinstance(norm, str):
        return cast(float, layer.eps), norm or "layer"
    if getattr(norm, "weight", None) is not None:
        raise ValueError(f"{type(layer).__name__}: norm has a weight; one with elementwise_affine=False is needed")
    if norm.eps is None:
        raise ValueError(f"{type(layer).__name__}: norm has eps = None; a number is needed")
    return cast(float, norm.eps), "rms" if isinstance(norm, nn.RMSNorm) else "layer"


class NormModulate(Layer):
    """norm(x)·(1 + scale) + shift; LayerNorm or RMSNorm without affine: `self.norm`, or the name of one and `self.eps`.

    Without a `norm` it is LayerNorm.
    """

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (B, N, D); shift, scale (B, D). Returns (B, N, D)."""
        eps, norm = _norm(self)
        return norm_modulate(x, _checked(self, "shift", x, shift), _checked(self, "scale", x, scale), eps, norm=norm)


class GateResidual(Layer):
    """x + gate·a."""

    def forward(self, x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
        """x, a (B, N, D); gate (B, D). Returns (B, N, D)."""
        return gate_residual(x, a, _checked(self, "gate", x, gate))


class GateResidualNormModulate(Layer):
    """x' = x + gate·a and y = norm(x')·(1 + scale) + shift, in one pass; norm and eps as in NormModulate."""

    def forward(self, x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x, a (B, N, D); gate, shift, scale (B, D). Returns (x', y), both (B, N, D)."""
        gate, shift = _checked(self, "gate", x, gate), _checked(self, "shift", x, shift)
        eps, norm = _norm(self)
        return gate_residual_norm_modulate(x, a, gate, shift, _checked(self, "scale", x, scale), eps, norm=norm)


HEAD_NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}


class PackedQKNorm(Layer):
    """`self.q_norm` and `self.k_norm` over head_dim of q and k, and their rotation, read from the packed projection.

    Both are `nn.LayerNorm`, `nn.RMSNorm` or `nn.Identity`, with affine or without.
    """

    q_norm: nn.Module
    k_norm: nn.Module

    def forward(self, qkv: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, N, 3, H, d); rope (1 or B, N, d) as `qk_norm` takes it. Returns q, k, v, each (B, H, N, d);
        (B, N, H, d) in memory, v a view of qkv."""
        q_norm, k_norm = self.q_norm, self.k_norm
        norm = next((name for name, kind in HEAD_NORMS.items() if isinstance(q_norm, kind)), "")
        eps = getattr(q_norm, "eps", 1e-6)  # of an Identity nothing uses it
        if not norm or not isinstance(k_norm, HEAD_NORMS[norm]) or eps != getattr(k_norm, "eps", 1e-6):
            raise ValueError(
                f"{type(self).__name__}: q_norm and k_norm are {type(q_norm).__name__} and {type(k_norm).__name__}; "
                "two LayerNorms, RMSNorms or Identities of one eps are needed"
            )
        if eps is None:  # RMSNorm's default: one by its input's dtype
            raise ValueError(f"{type(self).__name__}: q_norm has eps = None; a number is needed")
        (q_weight, q_bias), (k_weight, k_bias) = (
            (getattr(of, "weight", None), getattr(of, "bias", None)) for of in (q_norm, k_norm)
        )
        return qk_norm(qkv, q_weight, q_bias, k_weight, k_bias, eps, norm=norm, rope=rope)


class _Norm(nn.Module):
    """The constructor of the layers below: eps, and which norm, "layer" or "rms" (arXiv 1910.07467)."""

    def __init__(self, eps: float = 1e-6, norm: str = "layer") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"{type(self).__name__}: norm = {norm!r}; one of {', '.join(NORMS)} is needed")
        self.eps, self.norm = eps, norm

    def extra_repr(self) -> str:
        return f"eps={self.eps}" + (f", norm={self.norm!r}" if self.norm != "layer" else "")


class AdaLNModulate(_Norm, NormModulate):
    """The modulated norm of DiT (arXiv 2212.09748): norm(x)·(1 + scale) + shift, without parameters."""


class GatedResidualAdaLN(_Norm, GateResidualNormModulate):
    """The end of a sub-layer and the start of the next: x' = x + gate·a and norm(x')·(1 + scale) + shift."""


class QKNorm(PackedQKNorm):
    """LayerNorm with affine on queries and keys (arXiv 2302.05442), or with norm="rms" RMSNorm with weights; parameters
    are named as in timm's `Attention`."""

    def __init__(self, head_dim: int, eps: float = 1e-6, norm: str = "layer") -> None:
        super().__init__()
        if norm not in ("layer", "rms"):
            raise ValueError(f"{type(self).__name__}: norm = {norm!r}; one of layer, rms is needed")
        make = nn.RMSNorm if norm == "rms" else nn.LayerNorm
        self.q_norm, self.k_norm = make(head_dim, eps=eps), make(head_dim, eps=eps)


def _mean(weight: Tensor | None, like: Tensor) -> Tensor:
    """Weights (M,) float32 of a mean over the samples of `like` (M, N, D), of which there may be none."""
    count = max(like.shape[0], 1)
    if weight is None:
        return torch.full((like.shape[0],), 1 / count, dtype=torch.float32, device=like.device)
    return weight / count


class AlignLoss(Layer):
    """REPA's alignment (arXiv 2410.06940): the mean over samples of weight · mean_n −cos(features_n, target_n)."""

    def forward(self, features: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """features, target (B, N, D), target without gradient; weight (B,). Returns a float32 scalar."""
        return align(features, target.detach(), _mean(weight, features))


class GuidedFeatureLoss(nn.Module):
    """Distance to the guided features f = f_∅ + ω·(f_y − f_∅) of a frozen teacher (arXiv 2601.07773).

    `loss` is "mse", "cosine" or "normalized_mse": see `reference.guided_feature_loss`.
    """

    def __init__(self, cfg_scale: float, loss: str = "mse") -> None:
        super().__init__()
        if loss not in FEATURE_LOSSES:
            raise ValueError(f"GuidedFeatureLoss: loss = {loss!r}; one of {', '.join(FEATURE_LOSSES)} is needed")
        self.cfg_scale, self.loss = cfg_scale, loss

    def forward(
        self, q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """q (B, N, D); f_cond, f_null (M, N, D), without gradient; weight (M,); index (M,) int64: the rows of q that
        are supervised, distinct, all if None. Returns the mean over the M samples, a float32 scalar; 0 if M = 0."""
        mean = _mean(weight, f_cond)
        return guided_feature_loss(q, f_cond.detach(), f_null.detach(), mean, self.cfg_scale, self.loss, index)

    def extra_repr(self) -> str:
        return f"cfg_scale={self.cfg_scale}, loss={self.loss!r}"


# Forwards of blocks that others wrote. Where an op doesn't fit (a modulation a token, a norm with affine, a result that
# would be promoted to another dtype than x's, a forward-mode derivative) the site is computed in plain PyTorch, as the
# block itself does.


def without_affine(norm: nn.Module) -> str | None:
    """ "layer" or "rms" for such a norm over the last axis without affine, which the ops compute; None for others.

    By name, as diffusers isn't imported. An RMSNorm without an eps takes one by its input's dtype: not the ops' way.
    """
    if type(norm).forward is nn.LayerNorm.forward or type(norm).__name__ == "FP32LayerNorm":
        kind, fits = "layer", norm.weight is None and norm.bias is None
    else:
        kind, fits = "rms", type(norm).forward is nn.RMSNorm.forward and norm.weight is None and norm.eps is not None
    return kind if fits and len(cast(nn.LayerNorm, norm).normalized_shape) == 1 else None


def _rows(x: Tensor, *vectors: Tensor, a: Tensor | None = None) -> list[Tensor]:
    """The modulations as (B, D) where an op takes them and x (B, N, D) keeps its dtype in PyTorch too, or else []."""
    rows = [row for row in (_row(x, vector) for vector in vectors) if row is not None]
    others = [vectors[0], vectors[0] if a is None else a]
    if (
        forward_mode()
        or len(rows) < len(vectors)
        or any(row.dtype != rows[0].dtype for row in rows)
        or any(torch.promote_types(x.dtype, other.dtype) != x.dtype for other in others)
        or (a is not None and a.shape != x.shape)
    ):
        return []
    return rows


def _over_tokens(vector: Tensor) -> Tensor:
    return vector.unsqueeze(1) if vector.dim() == 2 else vector


def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift: x (B, N, D); shift, scale (B, D) or (B, 1 or N, D)."""
    rows, kind = _rows(x, shift, scale), without_affine(norm)
    if rows and kind:
        return norm_modulate(x, rows[0], rows[1], cast(float, norm.eps), norm=kind)
    return norm(x) * (1 + _over_tokens(scale)) + _over_tokens(shift)


def gated(x: Tensor, a: Tensor, gate: Tensor) -> Tensor:
    """x + gate·a: x, a (B, N, D); gate (B, D) or (B, 1 or N, D)."""
    rows = _rows(x, gate, a=a)
    return gate_residual(x, a, rows[0]) if rows else x + _over_tokens(gate) * a


def gated_modulated(
    norm: nn.Module, x: Tensor, a: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·a and norm(x')·(1 + scale) + shift; shapes as above."""
    rows, kind = _rows(x, gate, shift, scale, a=a), without_affine(norm)
    if rows and kind:
        return gate_residual_norm_modulate(x, a, rows[0], rows[1], rows[2], cast(float, norm.eps), norm=kind)
    x = gated(x, a, gate)
    return x, modulated(norm, x, shift, scale)


class FusedDiTBlock(Layer):
    """The block of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), by its `norm1`, `attn`, `norm2`, `mlp` and
    `adaLN_modulation`: three ops around attention and MLP."""

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D). Returns (B, N, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        a = self.attn(modulated(self.norm1, x, shift_msa, scale_msa))
        x, y = gated_modulated(self.norm2, x, a, gate_msa, shift_mlp, scale_mlp)
        return gated(x, self.mlp(y), gate_mlp)


class FusedFinalLayer(Layer):
    """DiT's and SiT's last layer, by its `norm_final`, `linear` and `adaLN_modulation`."""

    norm_final: nn.Module
    linear: nn.Module
    adaLN_modulation: nn.Module

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D). Returns (B, N, p·p·C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final, x, shift, scale))


class FusedAttention(Layer):
    """Self-attention over all tokens, by the `qkv`, `proj` and `num_heads` of timm's `Attention`.

    The op is the CPU's, for float32; elsewhere it is PyTorch's own, from the packed projection too.
    """

    qkv: nn.Module
    proj: nn.Module
    num_heads: int

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D). Returns (B, N, D). Raises ValueError where the module has a norm or a dropout in between."""
        for name, child in self.named_children():
            if name not in ("qkv", "proj") and not isinstance(child, nn.Identity) and getattr(child, "p", None) != 0:
                raise ValueError(f"FusedAttention: {name} = {child} would be left out; only qkv and proj are computed")
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads)
        out = attention(qkv) if x.device.type == "cpu" else attn.attention(qkv)
        return self.proj(out.reshape(b, n, d))


class FusedGELU(Layer):
    """`nn.GELU`: the op where its `approximate` is "tanh"."""

    approximate: str

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; the same comes back."""
        return gelu_tanh(input) if self.approximate == "tanh" else nn.functional.gelu(input)


class FusedSwiGLU(Layer):
    """The MLP of LightningDiT and DINOv2, `SwiGLUFFN`, by its `w12` (gate and value in one layer) and `w3`."""

    w12: nn.Module
    w3: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D). Returns (…, D)."""
        return self.w3(swiglu(self.w12(x)))


class FusedLinear(Layer):
    """`nn.Linear`: oneDNN on the CPU where that is faster, PyTorch's own elsewhere."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """input (…, K). Returns (…, M)."""
        if self.bias is None or input.dtype != self.weight.dtype:  # as under autocast
            return nn.functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)
