"""Internal Guidance (arXiv 2512.24176): a second final layer on a shallow block learns the same velocity.

The head is part of the network (`model.internal_head`), so it is averaged, saved and sampled with it: see
`st_fast.sample.guided`.
"""

from torch import Tensor

from st_fast.model import flow
from st_fast.recipe import methods
from st_fast.train.supervision import NoisyBatch, Supervision


class InternalGuidance(Supervision):
    """Σ_b weight_b · mean_CHW (v̂_i − v)², v̂_i the internal head's velocity.

    With `target_guidance` ω the final output v̂_f learns v + ω·(v̂_f − v̂_i), the difference without gradient (the
    paper's section on faster training, which is not in the released code).
    """

    settings: methods.InternalGuidance

    def denoising_target(self, prediction: Tensor, hidden: Tensor, batch: NoisyBatch) -> Tensor:
        if self.settings.target_guidance == 0:
            return batch.velocity
        difference = prediction.detach().float() - hidden.detach().float()
        return batch.velocity + self.settings.target_guidance * difference

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        return (batch.rows.take(batch.velocity),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        return (batch.rows.weight * flow.denoising_loss(batch.rows.take(hidden), target[0])).sum()
