"""Argument checks of the public ops: one line that names the op, the argument, what came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import FEATURE_LOSSES

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _floating(op: str, **tensors: Tensor) -> None:
    """All are floating tensors on the first one's device; float64 only where the first one is."""
    lead_name, lead = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; a tensor is needed")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; allowed are {', '.join(map(str, FLOATING))}")
        if tensor.dtype == torch.float64 != lead.dtype:
            raise TypeError(f"{op}: {name} has dtype torch.float64, but {lead_name} {lead.dtype}: nothing computes so")
        if tensor.device != lead.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {lead_name}'s device, {lead.device}")


def _shape(op: str, name: str, tensor: Tensor, wanted: Sequence[int], letters: str) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; {letters} = {tuple(wanted)} is needed")


def _rank(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """As many axes as there are letters, and none but the first (the batch) empty."""
    if tensor.dim() != letters.count(",") + 1 or 0 in tensor.shape[1:]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; {letters} is needed, with every size but the first ≥ 1"
        )


def _frozen(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires grad, but the op has no gradient to it; pass {name}.detach()")


def _eps(op: str, eps: float) -> None:
    if not 0 < eps < math.inf:  # math.isfinite would break the graph of a dynamic compilation
        raise ValueError(f"{op}: eps = {eps}; a finite number > 0 is needed")


def _cfg_scale(op: str, cfg_scale: float) -> None:
    if not -math.inf < cfg_scale < math.inf:
        raise ValueError(f"{op}: cfg_scale = {cfg_scale}; a finite number is needed")


def modulated(op: str, x: Tensor, a: Tensor | None, eps: float | None = None, **vectors: Tensor) -> None:
    """x and a (B, N, D); every modulation vector (B, D), all of one dtype."""
    _floating(op, x=x, **({} if a is None else {"a": a}), **vectors)
    _rank(op, "x", x, "(B, N, D)")
    if a is not None:
        _shape(op, "a", a, x.shape, "x's (B, N, D)")
    first, dtype = next((name, vector.dtype) for name, vector in vectors.items())
    for name, vector in vectors.items():
        _shape(op, name, vector, (x.shape[0], x.shape[2]), "x's (B, D)")
        if vector.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {vector.dtype}; {first}'s, {dtype}, is needed")
    if eps is not None:
        _eps(op, eps)


def features(op: str, q: Tensor, weight: Tensor, **frozen: Tensor) -> None:
    """Frozen features (M, N, D) and weights (M,) for q (B, N, D)."""
    _floating(op, q=q, **frozen, weight=weight)
    _rank(op, "q", q, "(B, N, D)")
    first = next(iter(frozen))
    for name, f in frozen.items():
        _rank(op, name, f, "(M, N, D)")
        _shape(op, name, f, (frozen[first].shape[0], *q.shape[1:]), "(M, N, D), with q's N and D,")
    _shape(op, "weight", weight, frozen[first].shape[:1], f"{first}'s (M,)")
    _frozen(op, weight=weight, **frozen)


def aligned(op: str, q: Tensor, f: Tensor, weight: Tensor) -> None:
    """One f for every q."""
    features(op, q, weight, f=f)
    _shape(op, "f", f, q.shape, "q's (B, N, D)")


def guided(
    op: str, q: Tensor, f_cond: Tensor, f_null: Tensor, weight: Tensor, cfg_scale: float, loss: str,
    index: Tensor | None,
) -> None:  # fmt: skip
    """One pair of features for every q, or for those that `index` names."""
    features(op, q, weight, f_cond=f_cond, f_null=f_null)
    _cfg_scale(op, cfg_scale)
    if loss not in FEATURE_LOSSES:
        raise ValueError(f"{op}: loss = {loss!r}; one of {', '.join(FEATURE_LOSSES)} is needed")
    if index is None:
        _shape(op, "f_cond", f_cond, q.shape, "q's (B, N, D), as there is no index,")
        return
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index has dtype {index.dtype}; torch.int64 is needed")
    if index.device != q.device:
        raise ValueError(f"{op}: index is on {index.device}; it must be on q's device, {q.device}")
    _shape(op, "index", index, f_cond.shape[:1], "f_cond's (M,)")
    if index.shape[0] > q.shape[0]:
        raise ValueError(f"{op}: index names {index.shape[0]} samples; q has {q.shape[0]}, and they must be distinct")


def extrapolated(op: str, f_cond: Tensor, f_null: Tensor, cfg_scale: float) -> None:
    """Features of one shape, whatever it is."""
    _floating(op, f_cond=f_cond, f_null=f_null)
    _shape(op, "f_null", f_null, f_cond.shape, "f_cond's shape")
    _cfg_scale(op, cfg_scale)


def packed(op: str, qkv: Tensor) -> None:
    """qkv (B, N, 3, H, d)."""
    _floating(op, qkv=qkv)
    _rank(op, "qkv", qkv, "(B, N, 3, H, d)")
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; (B, N, 3, H, d) is needed")


def packed_affine(op: str, qkv: Tensor, eps: float, **vectors: Tensor) -> None:
    """qkv (B, N, 3, H, d) and affine vectors (d,), all of one dtype."""
    packed(op, qkv)
    _floating(op, **vectors)
    first, dtype = next((name, vector.dtype) for name, vector in vectors.items())
    for name, vector in vectors.items():
        _shape(op, name, vector, qkv.shape[-1:], "qkv's (d,)")
        if vector.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {vector.dtype}; {first}'s, {dtype}, is needed")
    _eps(op, eps)


def linear(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """x (…, K), weight (M, K), bias (M,), all of one dtype."""
    _floating(op, x=x, weight=weight, bias=bias)
    _rank(op, "weight", weight, "(M, K)")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; (…, {weight.shape[1]}), weight's K, is needed")
    _shape(op, "bias", bias, weight.shape[:1], "weight's (M,)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; x's, {x.dtype}, is needed")


def elementwise(op: str, x: Tensor) -> None:
    """A floating tensor of any shape."""
    _floating(op, x=x)


def gradients(op: str, grads: Sequence[Tensor]) -> None:
    """Floating tensors of any shapes on one device."""
    if grads:
        _floating(op, **{f"grads[{i}]": g for i, g in enumerate(grads)})


def optimiser(
    op: str, params: Sequence[Tensor], lists: dict[str, Sequence[Tensor]], optional: dict[str, Sequence[Tensor]],
    scalars: dict[str, Tensor],
) -> None:  # fmt: skip
    """Lists of one length and shape for shape, optional ones maybe empty; scalars 0-dim on the same device."""
    if not params:
        raise ValueError(f"{op}: params is empty; at least one tensor is needed")
    device = params[0].device
    for name, tensors in {"params": params, **lists, **optional}.items():
        if len(tensors) != len(params) and not (name in optional and len(tensors) == 0):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors; {len(params)}, one a parameter, are needed")
        allowed = ALLOWED[name]
        for i, tensor in enumerate(tensors):
            label = f"{name}[{i}]"
            if tensor.dtype not in allowed:
                raise TypeError(f"{op}: {label} has dtype {tensor.dtype}; allowed: {', '.join(map(str, allowed))}")
            if tensor.device != device:
                raise ValueError(f"{op}: {label} is on {tensor.device}; it must be on params[0]'s device, {device}")
            _shape(op, label, tensor, params[i].shape, f"the shape of params[{i}]")
            if name != "grads" and not tensor.is_contiguous():
                raise ValueError(f"{op}: {label} has strides {tensor.stride()}; it is written, and must be contiguous")
    for name, scalar in scalars.items():
        _shape(op, name, scalar, (), "a 0-dim tensor, ()")
        if scalar.dtype not in ALLOWED[name]:
            raise TypeError(f"{op}: {name} has dtype {scalar.dtype}; allowed: {', '.join(map(str, ALLOWED[name]))}")
        if scalar.device != device:
            raise ValueError(f"{op}: {name} is on {scalar.device}; it must be on params[0]'s device, {device}")


ALLOWED: dict[str, tuple[torch.dtype, ...]] = {
    "params": (torch.float32,),
    "grads": (torch.float32, torch.bfloat16),
    "exp_avgs": (torch.float32,),
    "exp_avg_sqs": (torch.float32,),
    "emas": (torch.float32,),
    "copies": (torch.bfloat16, torch.float16),
    "step": (torch.float32, torch.int64),
    "grad_norm": (torch.float32,),
    "lr": (torch.float32,),
}
"""The dtypes adamw_ema_ takes, by argument."""
