"""The ops under measurement, as their families declare them: inputs as training has them, bytes that each must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from st_fast import kernels
from st_fast.kernels.common import trial
from st_fast.kernels.common.trial import Draw, Inputs
from st_fast.recipe.architecture import SIZES

TOKENS = 256


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
    def shape(self) -> trial.Size:
        """What an op is tried with."""
        return trial.Size(self.batch, self.tokens, self.width, self.heads)

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
        return kernels.declared(self.op).call

    @property
    def eager(self) -> Callable[..., Any]:
        return kernels.declared(self.op).definition

    def inputs(self, seed: int) -> Inputs:
        """Random inputs, drawn from `seed`."""
        make = kernels.declared(self.op).trial
        assert make is not None
        return make(Draw(self.device, self.dtype, seed), self.size.shape)

    @property
    def floor(self) -> Traffic:
        """Bytes that the mathematics must move."""
        return Traffic(*self._bytes[0])

    @property
    def moved(self) -> Traffic:
        """Bytes that the fused op's interface moves."""
        return Traffic(*self._bytes[1])

    @property
    def _bytes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        return kernels.declared(self.op).bytes(self.size.shape, self.dtype.itemsize, self.device.type)
