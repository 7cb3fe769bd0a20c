"""Blocks and models that `patch` knows, with inputs for them, and how outputs and gradients are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_dit import DiT, DiTBlock, SiTBlock, randomised
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

B, N, T, D, H = 3, 5, 4, 24, 2
Inputs = dict[str, Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


def run(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs and parameters, by name; in what the inputs are."""
    leaves = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    for leaf in (*leaves.values(), *module.parameters()):
        leaf.grad = None
    torch.manual_seed(0)  # diffusers drops labels at random
    out = module(**inputs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    torch.autograd.backward(outs, [torch.cos(o.detach().float() * (i + 1)).to(o.dtype) for i, o in enumerate(outs)])
    grads = {name: value.grad for name, value in [*leaves.items(), *module.named_parameters()]}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {str(i): o.detach() for i, o in enumerate(outs)} | whole


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values() if value is not None)
    for name, value in ours.items():
        if value is None:  # such as a layer whose output isn't used
            assert theirs[name] is None, name
            continue
        assert value.dtype == theirs[name].dtype, name
        scale = max(float(theirs[name].abs().max()), 1e-2 * largest)  # the gradient of a key's bias is rounding alone
        assert float((value - theirs[name]).abs().max()) < tolerance * scale, name


def text() -> Inputs:
    return {"hidden_states": draw(B, N, D), "encoder_hidden_states": draw(B, T, D), "temb": draw(B, D)}


def labels() -> Inputs:
    return {"timestep": torch.tensor([3.0, 500.0, 900.0]), "class_labels": torch.tensor([1, 0, 7])}


def with_rms_norm() -> nn.Module:
    block = DiTBlock(D, H)
    block.norm1, block.norm2 = (nn.RMSNorm(D, eps=2e-2, elementwise_affine=False) for _ in range(2))
    return block


def basic(norm_type: str, **others: Any) -> nn.Module:
    attention = pytest.importorskip("diffusers.models.attention")
    more = {"num_embeds_ada_norm": 10} if norm_type == "ada_norm_zero" else {}
    return attention.BasicTransformerBlock(
        D, H, D // H, norm_type=norm_type, norm_elementwise_affine=False, norm_eps=1e-2, attention_bias=True,
        activation_fn="gelu-approximate", **more, **others,
    )  # fmt: skip


def of(module: str, name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return getattr(pytest.importorskip(f"diffusers.models.{module}"), name)(*args, **kwargs)

    return make


FLUX, NORMS, ATTENTION = "transformers.transformer_flux", "normalization", "attention"
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs], str]] = {
    "DiT": (DiT, lambda: {"x": draw(B, N, D), "c": draw(B, D)}, "2 DiTBlock, 1 FinalLayer"),
    "DiT with RMSNorm": (with_rms_norm, lambda: {"x": draw(B, N, D), "c": draw(B, D)}, "1 DiTBlock"),
    "SiT": (lambda: SiTBlock(D, H, eps=1e-2), lambda: {"x": draw(B, N, D), "c": draw(B, D)}, "1 SiTBlock"),
    "AdaLayerNormZero": (
        of(NORMS, "AdaLayerNormZero", D),
        lambda: {"x": draw(B, N, D), "emb": draw(B, D)},
        "1 AdaLayerNormZero",
    ),
    "AdaLayerNormZero with labels": (
        of(NORMS, "AdaLayerNormZero", D, 10, norm_type="fp32_layer_norm"),
        lambda: {"x": draw(B, N, D), "hidden_dtype": torch.float32} | labels(),
        "1 AdaLayerNormZero",
    ),
    "AdaLayerNormZeroSingle": (
        of(NORMS, "AdaLayerNormZeroSingle", D),
        lambda: {"x": draw(B, N, D), "emb": draw(B, D)},
        "1 AdaLayerNormZeroSingle",
    ),
    "AdaLayerNormContinuous": (
        of(NORMS, "AdaLayerNormContinuous", D, 20, elementwise_affine=False, eps=1e-2),
        lambda: {"x": draw(B, N, D), "conditioning_embedding": draw(B, 20)},
        "1 AdaLayerNormContinuous",
    ),
    "DiT of diffusers": (
        lambda: basic("ada_norm_zero"),
        lambda: {"hidden_states": draw(B, N, D)} | labels(),
        "1 BasicTransformerBlock, 1 AdaLayerNormZero",
    ),
    "PixArt": (
        lambda: basic("ada_norm_single", cross_attention_dim=20),
        lambda: {
            "hidden_states": draw(B, N, D),
            "encoder_hidden_states": draw(B, T, 20),
            "timestep": draw(B, 6 * D),
            "encoder_attention_mask": torch.tensor([[0.0, 0, -9, 0]]).expand(B, 1, T),
        },
        "1 BasicTransformerBlock",
    ),
    "Latte": (
        lambda: basic("ada_norm_single"),
        lambda: {"hidden_states": draw(B, N, D), "timestep": draw(B, 6 * D)},
        "1 BasicTransformerBlock",
    ),
    "Flux": (of(FLUX, "FluxTransformerBlock", D, H, D // H), text, "1 FluxTransformerBlock, 2 AdaLayerNormZero"),
    "Flux single": (
        of(FLUX, "FluxSingleTransformerBlock", D, H, D // H),
        text,
        "1 FluxSingleTransformerBlock, 1 AdaLayerNormZeroSingle",
    ),
    "SD3": (
        of(ATTENTION, "JointTransformerBlock", D, H, D // H),
        text,
        "1 JointTransformerBlock, 2 AdaLayerNormZero",
    ),
    "SD3's last": (
        of(ATTENTION, "JointTransformerBlock", D, H, D // H, context_pre_only=True),
        text,
        "1 JointTransformerBlock, 1 AdaLayerNormZero, 1 AdaLayerNormContinuous",
    ),
    "SD3.5 with dual attention": (
        of(ATTENTION, "JointTransformerBlock", D, H, D // H, use_dual_attention=True),
        text,
        "1 AdaLayerNormZero",
    ),
}


def made(name: str) -> tuple[nn.Module, Inputs, str]:
    make, inputs, says = CASES[name]
    return randomised(make()), inputs(), says


def whole_dit() -> tuple[nn.Module, Inputs]:
    model = pytest.importorskip("diffusers").DiTTransformer2DModel(
        num_attention_heads=H,
        attention_head_dim=D // H,
        in_channels=4,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=9,
    )
    return model, {"hidden_states": draw(B, 4, 4, 4)} | labels()


def whole_pixart() -> tuple[nn.Module, Inputs]:
    model = pytest.importorskip("diffusers").PixArtTransformer2DModel(
        num_attention_heads=H, attention_head_dim=D // H, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        cross_attention_dim=D, caption_channels=20, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": draw(B, 4, 4, 4), "encoder_hidden_states": draw(B, T, 20)}
    return model, inputs | {"timestep": torch.tensor([3, 500, 900])}


def whole_flux() -> tuple[nn.Module, Inputs]:
    model = pytest.importorskip("diffusers").FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=H,
        joint_attention_dim=20, pooled_projection_dim=16, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    ids = {"img_ids": torch.arange(3.0 * N).view(N, 3), "txt_ids": torch.zeros(T, 3)}
    return model, ids | {
        "hidden_states": draw(B, N, 8), "encoder_hidden_states": draw(B, T, 20), "pooled_projections": draw(B, 16),
        "timestep": torch.tensor([0.1, 0.5, 0.9]),
    }  # fmt: skip
