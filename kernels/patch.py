"""The fused forwards in other projects' models: adaLN blocks of DiT, SiT and diffusers.

    print(patch(model))  # 28 DiTBlock, 1 FinalLayer
    unpatch(model)

Only the `forward` of instances changes: classes, parameters, their names and the blocks' own hooks stay; hooks on a
norm inside a block no longer run. Patch before `torch.compile` and `fully_shard`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import for_diffusers
from .layers import FusedDiTBlock, FusedFinalLayer, Layer, without_affine

TOLERANCE = 1e-3
"""Of an output's largest entry: float32, with room for TF32. A block that computes something else is far outside."""

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A class that has a fused forward."""

    layer: type[Layer]
    norms: Callable[[Any], tuple[str, ...] | None]
    """Those of its norms that the ops would compute; None for an instance without adaLN, or of a kind not fused."""
    arguments: Callable[[Any, Callable[..., Tensor]], Arguments]
    """Small inputs for one of its instances, from a function that draws a tensor of a shape."""
    package: str = ""
    """Where the class is defined; anywhere if empty."""


def _dit_block(module: Any, draw: Callable[..., Tensor]) -> Arguments:
    linear = module.adaLN_modulation[-1]
    return {"x": draw(2, 4, linear.out_features // 6), "c": draw(2, linear.in_features)}


def _final_layer(module: Any, draw: Callable[..., Tensor]) -> Arguments:
    linear = module.adaLN_modulation[-1]
    return {"x": draw(2, 4, linear.out_features // 2), "c": draw(2, linear.in_features)}


def _labels(draw: Callable[..., Tensor]) -> Arguments:
    return {"timestep": draw(2).abs() * 100, "class_labels": draw(2).long() * 0}


def _zero(module: Any, draw: Callable[..., Tensor]) -> Arguments:
    width = module.linear.in_features
    emb = {"emb": draw(2, width)} if module.emb is None else _labels(draw) | {"hidden_dtype": torch.float32}
    return {"x": draw(2, 4, width)} | emb


def _basic(module: Any, draw: Callable[..., Tensor]) -> Arguments:
    x = {"hidden_states": draw(2, 4, module.dim)}
    if module.norm_type == "ada_norm_zero":
        return x | _labels(draw)
    text = (
        {} if module.cross_attention_dim is None else {"encoder_hidden_states": draw(2, 3, module.cross_attention_dim)}
    )
    return x | text | {"timestep": draw(2, 6 * module.dim)}


def _double(module: Any, draw: Callable[..., Tensor]) -> Arguments:
    width = module.norm2.normalized_shape[0]
    return {"hidden_states": draw(2, 4, width), "encoder_hidden_states": draw(2, 3, width), "temb": draw(2, width)}


def _single(module: Any, draw: Callable[..., Tensor]) -> Arguments:
    width = module.norm.linear.in_features
    return {"hidden_states": draw(2, 4, width), "encoder_hidden_states": draw(2, 3, width), "temb": draw(2, width)}


def _basic_norms(module: Any) -> tuple[str, ...] | None:
    if module.norm_type == "ada_norm_zero" and module.attn2 is None:
        return ("norm3",)
    return ("norm1", "norm2") if module.norm_type == "ada_norm_single" else None


def _double_norms(module: Any) -> tuple[str, ...] | None:
    if getattr(module, "use_dual_attention", False):
        return None
    return ("norm2",) if getattr(module, "context_pre_only", False) else ("norm2", "norm2_context")


DIT = Target(FusedDiTBlock, lambda m: ("norm1", "norm2"), _dit_block)
TARGETS = {
    "DiTBlock": DIT,
    "SiTBlock": DIT,
    "FinalLayer": Target(FusedFinalLayer, lambda m: ("norm_final",), _final_layer),
    "AdaLayerNormZero": Target(for_diffusers.FusedAdaLayerNormZero, lambda m: ("norm",), _zero, "diffusers"),
    "AdaLayerNormZeroSingle": Target(
        for_diffusers.FusedAdaLayerNormZeroSingle,
        lambda m: ("norm",),
        lambda m, draw: {"x": draw(2, 4, m.linear.in_features), "emb": draw(2, m.linear.in_features)},
        "diffusers",
    ),
    "AdaLayerNormContinuous": Target(
        for_diffusers.FusedAdaLayerNormContinuous,
        lambda m: ("norm",),
        lambda m, draw: {
            "x": draw(2, 4, m.linear.out_features // 2),
            "conditioning_embedding": draw(2, m.linear.in_features),
        },
        "diffusers",
    ),
    "BasicTransformerBlock": Target(for_diffusers.FusedBasicTransformerBlock, _basic_norms, _basic, "diffusers"),
    "FluxTransformerBlock": Target(for_diffusers.FusedFluxTransformerBlock, _double_norms, _double, "diffusers"),
    "FluxSingleTransformerBlock": Target(
        for_diffusers.FusedFluxSingleTransformerBlock, lambda m: (), _single, "diffusers"
    ),
    "JointTransformerBlock": Target(for_diffusers.FusedJointTransformerBlock, _double_norms, _double, "diffusers"),
}
"""By the name of the class."""


@dataclass(frozen=True)
class Patched:
    """How many instances of which class run fused, and how many were left, by class and reason."""

    fused: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {name}" for name, count in self.fused.items()) or "nothing is fused"
        left = "; ".join(f"{count} {name}" for name, count in self.left.items())
        return f"{fused}; as before: {left}" if left else fused


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _class(module: nn.Module) -> type[nn.Module]:
    """Its class; if `fully_shard` has given it another one, that which it had."""
    kind = type(module)
    return kind.__mro__[2] if "FSDPModule" in {base.__name__ for base in kind.__bases__} else kind


def _target(module: nn.Module) -> Target | None:
    kind = _class(module)
    target = TARGETS.get(kind.__name__)
    if target is None or (target.package and kind.__module__.partition(".")[0] != target.package):
        return None
    return target


def _unfit(module: nn.Module, target: Target, norms: tuple[str, ...]) -> str:
    """Why an instance can't run the fused forward, as far as it can be seen without running it, or ""."""
    if "forward" in module.__dict__:
        return "its forward is already replaced"
    takes = set(inspect.signature(_class(module).forward).parameters)
    if more := takes - set(inspect.signature(target.layer.forward).parameters):
        return f"its forward takes {', '.join(sorted(more))}, too"
    for name in norms:
        norm = getattr(module, name, module)
        if not without_affine(norm):
            return f"{name} is no LayerNorm or RMSNorm without weight and bias and of a given eps"
        if any(getattr(norm, hooks) for hooks in HOOKS):
            return f"{name} has a hook, which would no longer run"
    return ""


def _layout(module: nn.Module) -> tuple[type, str, str]:
    """Equal for instances whose forwards do the same, so that one of them is tried for all."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple)) and k != "training"}
    return _class(module), repr(module), repr(sorted(plain.items()))


def _stand_in(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor in float32; random where it is all zeros, as adaLN-Zero's weights are at first and hide everything."""
    if not tensor.is_floating_point():
        return tensor
    random = torch.randn(tensor.shape, generator=generator).mul_(0.1).to(tensor.device)
    return tensor.detach().float().clone() if bool(tensor.any()) else random


def _outputs(module: nn.Module, state: dict[str, Tensor], arguments: Arguments) -> list[Tensor | None]:
    devices = {tensor.device for tensor in state.values() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(0)
        out = torch.func.functional_call(module, dict(state), (), arguments)
    return list(out) if isinstance(out, tuple) else [out]


def _difference(module: nn.Module, target: Target) -> str:
    """Why the fused forward isn't that of the module, or "": both run on small inputs in float32, in eval mode and in
    train mode with the same dropout, and without hooks."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(tensor.is_meta or hasattr(tensor, "placements") for tensor in tensors.values()):
        return "its weights are sharded or on the meta device, so that it can't be tried"
    if not tensors:
        return "it has no weights of its own"
    device = next(iter(tensors.values())).device
    generator = torch.Generator().manual_seed(0)
    kept = [(part, {key: part.__dict__[key] for key in ("training", *HOOKS)}) for part in module.modules()]
    own: list[Tensor | None] = []
    fused: list[Tensor | None] = []
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            state = {name: _stand_in(tensor, generator) for name, tensor in tensors.items()}
            for part, attributes in kept:  # hooks are not to see these inputs
                part.__dict__.update({key: type(attributes[key])() for key in HOOKS})
            arguments = target.arguments(module, lambda *shape: torch.randn(shape, generator=generator).to(device))
            for mode in (False, True):
                module.train(mode)
                module.__dict__.pop("forward", None)
                own += _outputs(module, state, arguments)
                _bind(module, target.layer)
                fused += _outputs(module, state, arguments)
    except Exception as error:
        return f"trying it gave {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        module.__dict__.pop("forward", None)
        for part, attributes in kept:
            part.__dict__.update(attributes)
    for one, other in zip(own, fused):
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            if one is not other:
                return "its outputs have other shapes"
        elif not (one - other).abs().max() <= TOLERANCE * one.abs().max():
            return f"its outputs differ by up to {(one - other).abs().max():.1e}"
    return "" if len(own) == len(fused) else "it has another number of outputs"


def _bind(module: nn.Module, layer: type[Layer]) -> None:
    module.forward = functools.partial(layer.forward, module)  # a partial, as a bound method isn't pickled with it


def patch(model: nn.Module, check: bool = True) -> Patched:
    """Gives the blocks in `model` (or the block that it is) the fused forward of their class, and says which.

    A class is known by its name, and diffusers' by its package too. One block of each class and layout is first run
    both ways on small inputs, and all like it are left as they are if the outputs differ; `check=False` doesn't, as
    for weights that are on the meta device. Undo with `unpatch`.
    """
    fused: dict[str, int] = {}
    left: dict[str, int] = {}
    reasons: dict[tuple[type, str, str], str] = {}
    for module in model.modules():
        target = _target(module)
        norms = None if target is None else target.norms(module)
        if target is None or norms is None:
            continue
        key, reason = _layout(module), _unfit(module, target, norms)
        if not reason and check:
            if key not in reasons:
                reasons[key] = _difference(module, target)
            reason = reasons[key]
        name = _class(module).__name__
        if reason:
            left[f"{name}: {reason}"] = left.get(f"{name}: {reason}", 0) + 1
        else:
            _bind(module, target.layer)
            fused[name] = fused.get(name, 0) + 1
    return Patched(fused, left)


def unpatch(model: nn.Module) -> int:
    """Gives every block its own forward again; returns how many had another."""
    count, forwards = 0, {target.layer.forward for target in TARGETS.values()}
    for module in model.modules():
        bound = module.__dict__.get("forward")
        if isinstance(bound, functools.partial) and bound.func in forwards:
            del module.__dict__["forward"]
            count += 1
    return count
