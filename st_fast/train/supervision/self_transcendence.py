"""Stage 2 of Self-Transcendence (arXiv 2601.07773): guided features of a frozen teacher supervise a shallow block.

The teacher sees the same x_t and t with the condition and with the null condition, and stops at block `teacher_depth`;
f = f_∅ + ω·(f_y − f_∅) is compared with the student's projected block `student_depth`. Only supervised rows are run:
by `mask = "sample"` and "sample_mean" those are the samples inside the t-range.
"""

import torch
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.velocity_head import projector
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision


class Head(nn.Module):
    """The projection q of the student's tokens: (M, N, D) → (M, N, D'), D' = D unless `out` says another width.

    Keys `projectors.{0,2,4}.*`.
    """

    def __init__(self, width: int, hidden: int, kernels: KernelTable, out: int | None = None) -> None:
        super().__init__()
        self.projectors = projector(width, hidden, out or width, kernels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.projectors(tokens)


class SelfTranscendence(Supervision):
    """Σ over supervised rows of weight · ℓ(q, f), ℓ by `loss`: see `st_fast.kernels.guided_feature_loss`."""

    settings: methods.SelfTranscendence

    def __init__(self, settings: methods.SelfTranscendence, parts: Parts) -> None:
        super().__init__(settings, parts)
        if parts.teacher is None:
            raise ValueError("self_transcendence needs a teacher")
        self.teacher, self.heads = parts.teacher, Head(parts.config.width, settings.hidden, parts.kernels)

    @torch.no_grad()
    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        rows, depth = batch.rows, self.settings.teacher_depth
        inputs = (rows.passes(rows.take(values)) for values in (batch.x_t, batch.t, batch.condition))
        passes = [
            self.teacher.guided_features(x, t, condition, depth, self.parts.branches)
            for x, t, condition in zip(*inputs, strict=True)
        ]
        return passes[0] if len(passes) == 1 else tuple(torch.cat(parts) for parts in zip(*passes, strict=True))

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        q = self.heads(batch.rows.take(hidden))
        f_cond, f_null = target
        loss = self.kernels.guided_feature_loss(
            q, f_cond, f_null, batch.rows.weight, self.settings.cfg_scale, self.settings.loss
        )
        return loss.float()
