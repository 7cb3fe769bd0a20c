"""SRA with dual time and attention separation (arXiv 2607.02508): what SRA gains is augmentation along the noise.

Groups of an image's random tokens have a time each. The student's own average, which supervises, sees the same groups
of the same latents, noise and dropped conditions, at the times of `teacher_times`.
"""

import torch
from torch import Tensor

from st_fast.core import random
from st_fast.core.random import Purpose
from st_fast.model import flow
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision
from st_fast.train.supervision.sra import Head


class DualTime(Supervision):
    """Σ_b weight_b · mean_n −cos(q, f) over the channels, f the average's stream. Keys `ap_head.linear{1,2}.*`."""

    settings: methods.DualTime

    def __init__(self, settings: methods.DualTime, parts: Parts) -> None:
        super().__init__(settings, parts)
        if parts.average is None:
            raise ValueError("sra_dual needs the student's weight average")
        self.average, self.heads = parts.average, Head(parts.config.width)

    def teacher_times(self, batch: NoisyBatch) -> Tensor:
        """(B, G) the times at which the average looks, drawn from the samples' ordinals where they are drawn."""
        if self.settings.teacher_time == "self_flow":
            return batch.t.amin(1, keepdim=True).expand_as(batch.t)
        if self.settings.teacher_time == "same":
            return batch.t
        u = random.uniform(self.parts.seed, Purpose.TEACHER_TIME, batch.ordinals, batch.t.shape[1])
        if batch.layout is not None and batch.layout.whole is not None:  # of such a sample all tokens have one time
            u = torch.where(batch.layout.whole[:, None], u[:, :1], u)
        return (batch.t - self.settings.time_offset * u).clamp_min(0.0)

    @torch.no_grad()
    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        assert batch.layout is not None
        t, config, layout = self.teacher_times(batch), self.parts.config, batch.layout.dense
        average, condition, depth = self.average(), batch.student_condition, self.settings.teacher_depth
        if self.settings.teacher_groups is None:
            x_t, _ = flow.interpolate(batch.x, batch.noise, t[:, 0], self.parts.path)
            return (average.features(x_t, t[:, 0], condition, depth),)
        times = layout.pixel_times(t, average.grid_of(batch.x), config.patch)
        x_t, _ = flow.interpolate(batch.x, batch.noise, times, self.parts.path)
        return (average.features(x_t, t, condition, depth, layout),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        return self.kernels.align(self.heads(hidden), target[0], batch.rows.weight).float()
