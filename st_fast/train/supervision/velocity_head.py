"""Stage 1 of Self-Transcendence (arXiv 2601.07773): a head on a shallow block predicts velocity or latents.

The released code predicts the velocity (`target = "velocity"`); the paper's text says the clean latent ("latent").
"""

from torch import Tensor

from st_fast.model import velocity_head
from st_fast.model.layers import patchify
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Parts, Supervision


class VelocityHead(Supervision):
    """Σ over supervised rows of weight · mean_CHW (head(h_d) − target)², compared patch by patch."""

    settings: methods.VelocityHead

    def __init__(self, settings: methods.VelocityHead, parts: Parts) -> None:
        super().__init__(settings, parts)
        self.heads = velocity_head.Head(parts.config, settings.hidden, parts.kernels)

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        latents = batch.rows.take(batch.velocity if self.settings.target == "velocity" else batch.x)
        return (patchify(latents, self.parts.config.patch),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        prediction = self.heads(batch.rows.take(hidden))
        losses = (prediction.float() - target[0]).square().mean((1, 2))  # (M,)
        return (batch.rows.weight * losses).sum()
