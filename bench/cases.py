"""The ops under measurement: their inputs as training has them, and the bytes that each must move.

Counts are of elements a value of x (N·D a sample): `floor` is what the mathematics needs to read and write once,
`moved` what the op's interface reads and writes, statistics, modulation and saved gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from st_fast import kernels
from st_fast.recipe.architecture import SIZES

TOKENS = 256
CFG_SCALE = 30.0


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, the leaves that get gradients, and the gradients that come in."""

    args: tuple[Any, ...]
    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        tensors = [a for a in self.args if isinstance(a, Tensor)] + list(self.grads)
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a forward and a backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Size:
    """A model's size at one batch: "B/2" and so on."""

    name: str
    batch: int
    tokens: int = TOKENS

    @property
    def width(self) -> int:
        return SIZES[self.name.split("/")[0]][1]

    @property
    def heads(self) -> int:
        return SIZES[self.name.split("/")[0]][2]

    @property
    def label(self) -> str:
        at = "" if self.tokens == TOKENS else f", {self.tokens} tokens"
        return f"{self.name}, batch {self.batch}{at}"


@dataclass(frozen=True)
class Case:
    """One op at one size and dtype."""

    op: str
    size: Size
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> str:
        return f"{self.op} | {self.size.label} | {str(self.dtype).removeprefix('torch.')}"

    @property
    def fused(self) -> Callable[..., Any]:
        return getattr(kernels, self.op)

    @property
    def eager(self) -> Callable[..., Any]:
        return getattr(kernels.reference, self.op)

    def inputs(self, seed: int) -> Inputs:
        """Random inputs, drawn from `seed`."""
        return MAKERS[self.op](Draw(self.device, self.dtype, seed), self.size)

    @property
    def elements(self) -> int:
        return self.size.batch * self.size.tokens * self.size.width

    @property
    def floor(self) -> Traffic:
        """Bytes that the mathematics must move."""
        forward, backward = ELEMENTS[self.op][0]
        unit = self.elements * self.dtype.itemsize
        return Traffic(forward * unit, backward * unit)

    @property
    def moved(self) -> Traffic:
        """Bytes that the fused op's interface moves."""
        forward, backward = ELEMENTS[self.op][1]
        if self.device.type == "cpu" and self.op in ("align", "guided_feature_loss"):
            backward = 0  # there a factor of one is seen, and dq handed on as it is
        unit = self.elements * self.dtype.itemsize
        rows = {"qk_norm": 4 * self.size.heads}.get(self.op, 2 if "norm" in self.op else 0)
        statistics = 4 * rows * self.size.batch * self.size.tokens
        vectors = self.size.batch * self.size.width * self.dtype.itemsize
        vectors_in, vectors_out = VECTORS.get(self.op, (0, 0))
        return Traffic(
            forward * unit + statistics + vectors_in * vectors, backward * unit + statistics + vectors_out * vectors
        )


ELEMENTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "norm_modulate": ((2, 3), (2, 3)),  # read x, write y; read dy, x, write dx
    "gate_residual_norm_modulate": ((4, 6), (4, 6)),  # read x, a, write x', y; read dy, dx', x', a, write dx, da
    "gate_residual": ((3, 3), (3, 3)),  # read x, a, write x'; read dx', a, write da
    "align": ((3, 0), (3, 2)),  # read q, f, write dq; the backward only scales dq
    "guided_feature_loss": ((4, 0), (4, 2)),  # read q, f_y, f_∅, write dq
    "cfg_extrapolate": ((3, 3), (3, 3)),  # read f_y, f_∅, write f; read df, write two
    "qk_norm": ((6, 8), (6, 8)),  # read qkv, write q, k, v; read dq, dk, dv, q, k, write dqkv
    "linear": ((5, 10), (5, 10)),  # D → 4·D: read x, write y; read dy twice and x, write dx (weights beside them)
    "gelu_tanh": ((8, 12), (8, 12)),  # on 4·D channels: read x, write y; read dy, x, write dx
}
"""op → ((floor forward, backward), (moved forward, backward)), in elements a value of x."""

VECTORS = {"norm_modulate": (2, 3), "gate_residual_norm_modulate": (3, 5), "gate_residual": (1, 2)}
"""Modulation vectors (B, D) read forward; read and written backward."""


class Draw:
    """Draws tensors on one device from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        """One that wants a gradient."""
        return self(*shape).requires_grad_()

    def modulation(self, batch: int, width: int) -> tuple[Tensor, ...]:
        """Six leaves (B, D) that are strided views of one (B, 6D) tensor, as the model has them."""
        return tuple(view.detach().requires_grad_() for view in self(batch, 6 * width).chunk(6, dim=1))

    def weight(self, batch: int) -> Tensor:
        return torch.full((batch,), 0.5 / batch, device=self.device)


def _norm_modulate(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    x, (shift, scale, *_) = draw.leaf(*shape), draw.modulation(size.batch, size.width)
    return Inputs((x, shift, scale, 1e-6), (x, shift, scale), (draw(*shape),))


def _gate_residual_norm_modulate(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    x, a = draw.leaf(*shape), draw.leaf(*shape)
    _, _, gate, shift, scale, _ = draw.modulation(size.batch, size.width)
    leaves = (x, a, gate, shift, scale)
    return Inputs((*leaves, 1e-6), leaves, (draw(*shape), draw(*shape)))


def _gate_residual(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    leaves = (draw.leaf(*shape), draw.leaf(*shape), draw.modulation(size.batch, size.width)[2])
    return Inputs(leaves, leaves, (draw(*shape),))


def _align(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    q = draw.leaf(*shape)
    return Inputs((q, draw(*shape), draw.weight(size.batch)), (q,), (torch.ones((), device=draw.device),))


def _guided_feature_loss(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    q = draw.leaf(*shape)
    args = (q, draw(*shape), draw(*shape), draw.weight(size.batch), CFG_SCALE, "mse", None)
    return Inputs(args, (q,), (torch.ones((), device=draw.device),))


def _cfg_extrapolate(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    leaves = (draw.leaf(*shape), draw.leaf(*shape))
    return Inputs((*leaves, CFG_SCALE), leaves, (draw(*shape),))


def _qk_norm(draw: Draw, size: Size) -> Inputs:
    head = size.width // size.heads
    qkv = draw.leaf(size.batch, size.tokens, 3, size.heads, head)
    leaves = (qkv, *(draw.leaf(head) for _ in range(4)))
    grads = tuple(draw(size.batch, size.heads, size.tokens, head) for _ in range(3))
    return Inputs((*leaves, 1e-6), leaves, grads)


def _linear(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, size.width)
    x, weight, bias = draw.leaf(*shape), draw.leaf(4 * size.width, size.width), draw.leaf(4 * size.width)
    return Inputs((x, weight, bias), (x, weight, bias), (draw(*shape[:2], 4 * size.width),))


def _gelu_tanh(draw: Draw, size: Size) -> Inputs:
    shape = (size.batch, size.tokens, 4 * size.width)
    x = draw.leaf(*shape)
    return Inputs((x,), (x,), (draw(*shape),))


MAKERS: dict[str, Callable[[Draw, Size], Inputs]] = {
    "norm_modulate": _norm_modulate,
    "gate_residual_norm_modulate": _gate_residual_norm_modulate,
    "gate_residual": _gate_residual,
    "align": _align,
    "guided_feature_loss": _guided_feature_loss,
    "cfg_extrapolate": _cfg_extrapolate,
    "qk_norm": _qk_norm,
    "linear": _linear,
    "gelu_tanh": _gelu_tanh,
}
