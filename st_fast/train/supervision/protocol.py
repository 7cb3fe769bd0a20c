"""The protocol between the step and a supervision method.

A method names the student block or blocks it reads (`tap`), makes a target without gradient (`target`, which needs
nothing of the student's pass and so may run before or beside it, or a step ahead if nothing that it needs is trained:
`run.teacher_placement`), and turns hidden states into a loss (`loss`).
Losses are sums over samples already weighted by 1 / global batch size, so micro-batches and ranks simply add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.sit import Linear
from st_fast.recipe.methods import Selection


@dataclass(frozen=True)
class Rows:
    """Which samples of a micro-batch are supervised, and with what weight in the summed loss."""

    index: Tensor
    """(M,) int64: distinct rows, ascending; with `run.supervised_rows = "padded"` then others that weigh 0."""
    weight: Tensor
    """(M,) float32."""
    pass_rows: int = 0
    """Into so many rows each M divides, for networks that should see one shape; 0: M is what it is."""

    def take(self, values: Tensor) -> Tensor:
        """The supervised rows of (B, …): (M, …). If they are as many as the samples, they are the samples in order."""
        return values if len(self.index) == len(values) else values.index_select(0, self.index)

    def passes(self, values: Tensor) -> tuple[Tensor, ...]:
        """(M, …) cut into passes: (M,) or `pass_rows` rows each."""
        return values.split(self.pass_rows) if self.pass_rows else (values,)


@dataclass(frozen=True)
class NoisyBatch:
    """One micro-batch of one rank, on the device: what the model and the method see of it."""

    x: Tensor
    """(B, C, S, S) clean latents, scaled."""
    x_t: Tensor
    """(B, C, S, S) latents on the path from data to noise."""
    velocity: Tensor
    """(B, C, S, S) dx_t/dt."""
    noise: Tensor
    """(B, C, S, S) ε of x_t."""
    t: Tensor
    """(B,) float32."""
    labels: Tensor
    """(B,) int64 true labels."""
    student_labels: Tensor
    """(B,) int64 labels with class dropout applied."""
    ordinals: Tensor
    """(B,) int64: places in the training stream, the counters of the noise and of a method's own draws."""
    rows: Rows
    features: tuple[Tensor, ...] = ()
    """(B, h, w, D_j) of each image encoder j that supervises at this step, written beforehand, in the stored dtype."""
    images: Tensor | None = None
    """uint8 (B, 1 or 3, P, P), the latents' images, where encoders run live at this step."""


class Supervision(Protocol):
    """One supervision method for one stage."""

    tap: int | tuple[int, ...]
    heads: nn.Module
    """The trainable parts, dropped after training."""

    def active(self, step: int) -> bool:
        """Whether the method supervises at this step; if not, neither target nor loss is asked for."""

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        """What `loss` compares with, without gradient, for the supervised rows."""

    def loss(self, hidden: Any, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        """The summed, weighted loss: hidden (B, N, D) is the student's stream after block `tap`. Scalar float32.

        A tuple of blocks gives a tuple of their streams.
        """


def select_rows(t: Tensor, place: slice, selection: Selection | None) -> tuple[Tensor, Tensor]:
    """The supervised rows of a micro-batch and their weights, on the host, from all of the global batch's times.

    t (G,) float32 holds the whole global batch; `place` is this micro-batch's part of it. With m_b = t_b inside the
    closed range: "sample" is mean_b(m_b·ℓ_b); "sample_mean" is Σ m_b·ℓ_b / Σ m_b; "released" is mean(m)·mean(ℓ), as
    the released code's broadcasting makes it. Returns index (M,) int64 into the micro-batch and weight (M,) float32.
    """
    if selection is None:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    low, high = selection.t_range
    inside = (t >= low) & (t <= high)
    total, count = len(t), int(inside.sum())
    part = inside[place]
    if selection.mask == "released":
        index = torch.arange(len(part)) if count else torch.empty(0, dtype=torch.int64)
        return index, torch.full((len(index),), selection.weight * count / total**2)
    index = part.nonzero()[:, 0]
    divisor = total if selection.mask == "sample" else max(count, 1)
    return index, torch.full((len(index),), selection.weight / divisor)


def projector(width: int, hidden: int, out: int, kernels: KernelTable) -> nn.Sequential:
    """REPA's projector: a three-layer MLP with SiLU, keys 0, 2 and 4."""
    sizes = ((width, hidden), (hidden, hidden), (hidden, out))
    first, second, third = (Linear(inputs, outputs, kernels) for inputs, outputs in sizes)
    for layer in (first, second, third):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
