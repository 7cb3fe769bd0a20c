"""Parts of the argument checks: each raises TypeError or ValueError with one line that names the op, the argument, what
came and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(op: str, **tensors: Tensor) -> None:
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


def shape(op: str, name: str, tensor: Tensor, wanted: Sequence[int], letters: str) -> None:
    """Exactly the sizes `wanted`, which `letters` name."""
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; {letters} = {tuple(wanted)} is needed")


def rank(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """As many axes as there are letters, and none but the first (the batch) empty."""
    if tensor.dim() != letters.count(",") + 1 or 0 in tensor.shape[1:]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; {letters} is needed, with every size but the first ≥ 1"
        )


def one_dtype(op: str, **tensors: Tensor) -> None:
    """All have the first one's dtype."""
    first, dtype = next((name, tensor.dtype) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; {first}'s, {dtype}, is needed")


def bias(op: str, name: str, bias: Tensor | None, of: str, y: Tensor) -> None:
    """The bias of the layer that made y (…, D), the argument `of`: (D,), of any floating dtype; or None."""
    if bias is not None:
        floating(op, **{of: y, name: bias})
        shape(op, name, bias, y.shape[-1:], f"{of}'s (D,)")


def frozen(op: str, **tensors: Tensor) -> None:
    """None wants a gradient."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires grad, but the op has no gradient to it; pass {name}.detach()")


def eps(op: str, eps: float) -> None:
    """A finite number above 0."""
    if not 0 < eps < math.inf:  # math.isfinite would break the graph of a dynamic compilation
        raise ValueError(f"{op}: eps = {eps}; a finite number > 0 is needed")


def lengths(op: str, lengths: Sequence[int], tokens: int) -> None:
    """A tuple or list of integers ≥ 1 whose sum is the number of x's tokens."""
    if not isinstance(lengths, (tuple, list)):
        raise TypeError(f"{op}: lengths is a {type(lengths).__name__}; a tuple or list of integers is needed")
    for at, length in enumerate(lengths):
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"{op}: lengths[{at}] = {length!r}; an integer ≥ 1 is needed")
    if sum(lengths) != tokens:
        raise ValueError(f"{op}: lengths sum to {sum(lengths)}; x's N = {tokens} is needed")


def packed(op: str, qkv: Tensor) -> None:
    """qkv (B, N, 3, H, d)."""
    floating(op, qkv=qkv)
    rank(op, "qkv", qkv, "(B, N, 3, H, d)")
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}; (B, N, 3, H, d) is needed")
