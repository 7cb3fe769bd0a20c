"""Self-Flow (arXiv 2603.06507): tokens of one image have two times, and the student's own average sees the lower one.

The average sees the same latents, noise and dropped conditions, all of the image at τ = min(t, s).
"""

import torch
from torch import Tensor

from st_fast.model import flow
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision
from st_fast.train.supervision.sra import Head


class SelfFlow(Supervision):
    """Σ_b weight_b · mean_n −cos(q, f) over the channels, f the average's stream. Keys `projector.linear{1,2}.*`."""

    settings: methods.SelfFlow

    def __init__(self, settings: methods.SelfFlow, parts: Parts) -> None:
        super().__init__(settings, parts)
        if parts.average is None:
            raise ValueError("self_flow needs the student's weight average")
        self.average, self.heads = parts.average, Head(parts.config.width, "projector")

    @torch.no_grad()
    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        lowest = batch.t.amin(1)  # of (B, 2)
        x_t, _ = flow.interpolate(batch.x, batch.noise, lowest, self.parts.path)
        return (self.average().features(x_t, lowest, batch.student_condition, self.settings.teacher_depth),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        return self.kernels.align(self.heads(hidden), target[0], batch.rows.weight).float()
