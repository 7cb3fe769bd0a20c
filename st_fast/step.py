"""One optimisation step: noise, teacher, student, losses, backward, update. No file, no log, no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from st_fast import flow, streams
from st_fast.feed import Batch
from st_fast.model import SiT
from st_fast.optim import Optimizer
from st_fast.parallel import Ranks
from st_fast.ranges import named
from st_fast.recipe.schema import Recipe
from st_fast.reduction import GradientSum
from st_fast.streams import Purpose
from st_fast.supervision import Noised, Supervision

REDUCTION = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Losses:
    """Scalars on the device, over this rank's part of the global batch; sums over ranks are the global means."""

    denoise: Tensor
    aux: Tensor


class Step:
    """Holds what a step needs; call it with the step number and this rank's micro-batches."""

    def __init__(
        self, model: SiT, supervision: Supervision, optimizer: Optimizer, recipe: Recipe, scale: float, ranks: Ranks
    ) -> None:
        self.model, self.supervision, self.optimizer = model, supervision, optimizer
        self.recipe, self.scale, self.place = recipe, scale, ranks.place
        self.gradients = GradientSum(optimizer.parameters(), ranks, REDUCTION[recipe.optim.reduction])

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> tuple[Losses, Tensor]:
        """Runs the step; returns the losses and the gradients' global norm, all left on the device."""
        parts = []
        for number, batch in enumerate(micro_batches, start=1):
            self.place.mark("step")
            with named("noise"):
                noised = self.noised(batch)
            losses = self.losses(step, noised)
            if number == len(micro_batches):
                self.gradients.expect()
            with named("backward"):
                (losses.denoise + losses.aux).backward()
            parts.append(Losses(losses.denoise.detach(), losses.aux.detach()))
        with named("exchange"):
            self.gradients.finish()
        with named("optimiser"):
            norm = self.optimizer.update()
        return Losses(_total([p.denoise for p in parts]), _total([p.aux for p in parts])), norm

    def noised(self, batch: Batch) -> Noised:
        """Draws latents from their moments and noises them: x = scale·(μ + σ·ξ), x_t on the recipe's path."""
        seed, shape = self.recipe.run.seed, batch.moments[0].chunk(2)[0].shape
        mean, std = batch.moments.float().chunk(2, dim=1)
        x = self.scale * (mean + std * streams.normal(seed, Purpose.POSTERIOR, batch.ordinals, shape))
        noise = streams.normal(seed, Purpose.NOISE, batch.ordinals, shape)
        x_t, velocity = flow.interpolate(x, noise, batch.t, self.recipe.flow.path)
        return Noised(
            x, x_t, velocity, batch.t, batch.labels, batch.student_labels, noise, batch.ordinals, batch.rows,
            batch.features,
        )  # fmt: skip

    def losses(self, step: int, noised: Noised) -> Losses:
        """The denoising loss and the supervision's, each a sum over samples weighted by 1 / global batch size."""
        supervised = self.supervision.active(step)
        with named("teacher"):
            target = self.supervision.target(noised) if supervised else ()
        with named("student forward"):
            prediction, hidden = self.model(noised.x_t, noised.t, noised.student_labels, self.supervision.tap)
        with named("loss"):
            denoise = flow.denoising_loss(prediction, noised.velocity).sum() / self.recipe.optim.batch_size
            aux = self.supervision.loss(hidden, target, noised) if supervised else torch.zeros_like(denoise)
        return Losses(denoise, aux)


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
