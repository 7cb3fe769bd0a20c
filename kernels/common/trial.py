"""Inputs of one forward and backward pass of an op, as training has them: for smoke tests, tests and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

CFG_SCALE = 30.0


@dataclass(frozen=True)
class Size:
    """B samples of N tokens with D channels in H heads."""

    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int = 0
    """Channels within the MLP; 0: 4·D."""

    @property
    def rows(self) -> tuple[int, int, int]:
        """(B, N, D)."""
        return self.batch, self.tokens, self.width

    @property
    def head(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, the leaves that get gradients, and the gradients that come in.

    An op that makes data has no leaves, and its backward pass is nothing.
    """

    args: tuple[Any, ...]
    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def backward(self, outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the leaves, from as many of the gradients that come in as there are outputs."""
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if not self.leaves:
            return ()
        return torch.autograd.grad(outputs, self.leaves, self.grads[: len(outputs)])

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        tensors = [a for a in self.args if isinstance(a, Tensor)] + list(self.grads)
        return sum(t.numel() * t.element_size() for t in tensors)


class Draw:
    """Draws normal tensors of one dtype on one device from one seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype or self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        """One that wants a gradient."""
        return self(*shape).requires_grad_()

    def weights(self, wide: int, deep: int) -> Tensor:
        """A layer's leaf (wide, deep) that keeps the size of what goes through it."""
        return (self(wide, deep) * deep**-0.5).requires_grad_()

    def modulation(self, size: Size, *vectors: int) -> tuple[Tensor, ...]:
        """Six leaves (B, D) that are strided views of one (B, 6D) tensor, as a model has them; with a number of vectors
        a sample between."""
        parts = self(size.batch, *vectors, 6 * size.width).chunk(6, dim=-1)
        return tuple(part.detach().requires_grad_() for part in parts)

    def bias(self, channels: int) -> Optional[Tensor]:
        """The bias of the layer before an op, a leaf, where the op sums its gradient by default: on CUDA."""
        return self.leaf(channels) if self.device.type == "cuda" else None

    def weight(self, size: Size) -> Tensor:
        """A weight of each sample in a loss (B,), float32."""
        return torch.full((size.batch,), 0.5 / size.batch, device=self.device)

    def one(self) -> Tensor:
        """The gradient that comes to a loss."""
        return torch.ones((), device=self.device)


def with_bias(leaves: tuple[Tensor, ...], bias: Optional[Tensor]) -> tuple[Tensor, ...]:
    """The leaves, and the bias if there is one."""
    return leaves if bias is None else (*leaves, bias)
