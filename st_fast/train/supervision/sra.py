"""SRA (arXiv 2505.02831): the student's own weight average, deeper and at less noise, supervises a shallow block.

The teacher sees the same latents, noise and dropped conditions at the time max(t − u, 0), u uniform in
(0, time_offset).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.model import flow
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision

BETA = 0.05
"""Where smooth-L1 passes from a parabola to a line, as published."""


class Head(nn.Module):
    """The projection q of the student's tokens, D → 2D → D with SiLU between. Keys `NAME.linear{1,2}.*`."""

    def __init__(self, width: int, name: str = "ap_head") -> None:
        super().__init__()
        layers = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.name = name
        self.add_module(name, nn.ModuleDict({"linear1": layers[0], "linear2": layers[1]}))

    def forward(self, tokens: Tensor) -> Tensor:
        layers = cast(nn.ModuleDict, self.get_submodule(self.name))
        return cast(Tensor, layers["linear2"](F.silu(layers["linear1"](tokens))))


class SelfRepresentation(Supervision):
    """Σ_b weight_b · ℓ(q, f), f the teacher's stream; ℓ by `loss`: smooth-L1, its mean over N and D, or mean_n −cos."""

    settings: methods.SelfRepresentation

    def __init__(self, settings: methods.SelfRepresentation, parts: Parts) -> None:
        super().__init__(settings, parts)
        if parts.average is None:
            raise ValueError("sra needs the student's weight average")
        self.average, self.heads = parts.average, Head(parts.config.width)

    def teacher_times(self, batch: NoisyBatch) -> Tensor:
        """(B,) the times at which the teacher looks, drawn from the samples' ordinals."""
        u = random.uniform(self.parts.seed, Purpose.TEACHER_TIME, batch.ordinals)[:, 0]
        return (batch.t - self.settings.time_offset * u).clamp_min(0.0)

    @torch.no_grad()
    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        t = self.teacher_times(batch)
        x_t, _ = flow.interpolate(batch.x, batch.noise, t, self.parts.path)
        return (self.average().features(x_t, t, batch.student_condition, self.settings.teacher_depth),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        q, weight = self.heads(hidden), batch.rows.weight
        if self.settings.loss == "cosine":
            return self.kernels.align(q, target[0], weight).float()
        losses = F.smooth_l1_loss(q.float(), target[0].float(), beta=BETA, reduction="none").mean((1, 2))  # (B,)
        return (weight * losses).sum()
