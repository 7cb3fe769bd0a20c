"""Dispersive loss (arXiv 2506.09027): samples of the whole global batch are pushed apart at one block, without a head.

L = log (1/B²) Σ_ij exp(−‖z_i − z_j‖²/(d·τ)), z_i all N·D = d numbers of a sample's stream, a sample with itself
included. The division by d is the released code's; it compares the samples of one rank alone, this compares all.
"""

import torch
from torch import Tensor

from st_fast.core.ranks import Ranks
from st_fast.train.supervision import NoisyBatch, Supervision


class Dispersive(Supervision):
    """λ·L over all ranks: each one's loss is its part of it, with the whole gradient of its own samples."""

    def loss(self, hidden: Tensor, target: tuple[Tensor, ...], batch: NoisyBatch) -> Tensor:
        ranks = self.parts.ranks
        part = dispersion(hidden.flatten(1), ranks, self.settings.temperature)  # type: ignore[attr-defined]
        return batch.rows.weight.sum() * ranks.count * part  # all samples are supervised: λ / ranks, times ranks


def dispersion(z: Tensor, ranks: Ranks, temperature: float) -> Tensor:
    """L / ranks of everyone's z, of which this rank has (b, d); its gradient is all of ∂L/∂z. All ranks call it alike.

    With S = Σ_ij k(z_i, z_j), ∂L/∂z_i = (1/S)·Σ_j ∂/∂z_i [k(z_i, z_j) + k(z_j, z_i)] and k is symmetric: twice what
    follows from the rank's own rows of pairs while everyone's z is held fixed. So nothing but z and the sum S travels.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    everyone = ranks.gather(z.detach()).to(dtype)  # (B, d)
    centre = everyone.mean(0)  # distances stay; their rounding, which goes with the norms, gets smaller
    mine, everyone = z.to(dtype) - centre, everyone - centre
    squares = mine.square().sum(1)[:, None] + everyone.square().sum(1) - 2 * mine @ everyone.T
    near = torch.exp(squares / (-z.shape[1] * temperature))  # (b, B)
    total = ranks.sum(near.detach().sum())
    ranks.heartbeat.beat("step")  # what comes now waits for nobody
    value = (total / len(everyone) ** 2).log() / ranks.count
    slope = 2 * near.sum() / total
    return value + (slope - slope.detach())
