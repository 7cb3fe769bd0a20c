"""SRA 2 (arXiv 2601.17830): a head on a shallow block has to give the clean latent of its tokens, at every time.

It differs from stage 1 of Self-Transcendence with `target = "latent"` in the head (five layers, no LayerNorm), in the
loss (smooth-L1 instead of squares) and in that every time is supervised.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from st_fast.kernels import KernelTable
from st_fast.model.layers import patchify
from st_fast.model.velocity_head import projector
from st_fast.recipe import methods
from st_fast.recipe.methods.sra2 import LAYERS
from st_fast.recipe.schema import Model
from st_fast.train.supervision import NoisyBatch, Parts, Supervision
from st_fast.train.supervision.sra import BETA


class Head(nn.Module):
    """Tokens (B, N, D) → their patches of a latent (B, N, p·p·C).

    Keys `projector.{0,2,4,6,8}.*`; published ones are not known.
    """

    def __init__(self, config: Model, hidden: int, kernels: KernelTable) -> None:
        super().__init__()
        self.projector = projector(config.width, hidden, config.patch_values, kernels, LAYERS)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.projector(tokens))


class Sra2(Supervision):
    """Σ_b weight_b · mean_CHW smooth-L1(head(h_d) − x), a parabola below BETA and a line above it; patch by patch."""

    heads: Head

    def __init__(self, settings: methods.Sra2, parts: Parts) -> None:
        super().__init__(settings, parts)
        self.heads = Head(parts.config, settings.hidden, parts.kernels)

    def target(self, batch: NoisyBatch) -> tuple[Tensor, ...]:
        return (patchify(batch.x, self.parts.config.patch),)

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        prediction = self.heads(hidden).float()
        losses = F.smooth_l1_loss(prediction, target[0].float(), beta=BETA, reduction="none").mean((1, 2))  # (B,)
        return (batch.rows.weight * losses).sum()
